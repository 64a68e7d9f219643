"""Draws the pictures of the documents that no run draws.

    python tools/pictures.py      docs/cards.png, tables.png, episode.png, cities.png, route.png
"""
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gp import GeneralPoints
from lib.settings import ROOT
from scenery.cards import LINE, PAPER, RANKS, SUITS, TABLE, draw_card, draw_table
from scenery.streets import street_views
from scenery.styles import CITIES, ICONS, font, paint_glyph
from scenery.town import Scene, Sign
from virl import RULES, Navigation

WHITE = (255, 255, 255)
INK = (20, 20, 30)
EPISODE = 281475976710781  # the seed of README's episode


def cards():
    """The pack: a row per suit, a column per rank."""
    sheet = Image.new("RGB", (13 * 100 + 10, 4 * 136 + 10), TABLE)
    for row, suit in enumerate(SUITS):
        for column, rank in enumerate(RANKS):
            card = draw_card(rank, suit, 90)
            sheet.paste(card, (10 + 100 * column, 10 + 136 * row), card)
    return sheet


def tables():
    """Tables as the models see them: at the paper's size (above) and at the mini's (below)."""
    black = [("K", "spades"), ("10", "clubs"), ("A", "clubs"), ("7", "spades")]
    red = [("Q", "hearts"), ("J", "diamonds"), ("3", "hearts"), ("9", "diamonds")]
    mixed = [("J", "spades"), ("4", "hearts"), ("Q", "clubs"), ("10", "diamonds")]
    shown = {"black": black, "red": red, "mixed": mixed, "jitter": mixed}

    sheet = Image.new("RGB", (4 * 460 + 12, 256 + 482), PAPER)
    draw = ImageDraw.Draw(sheet)
    text_font = ImageFont.load_default(15)
    for column, (name, hand) in enumerate(shown.items()):
        x = 12 + 460 * column
        jitter = random.Random(0) if name == "jitter" else None
        large = draw_table(hand, 1200, 600, jitter).resize((448, 224), Image.Resampling.LANCZOS)
        small = draw_table(hand, 112, 112, jitter).resize((448, 448), Image.Resampling.NEAREST)
        draw.text((x, 4), f"{name}, 1200 x 600", LINE, text_font)
        sheet.paste(large, (x, 24))
        draw.text((x, 260), f"{name}, 112 x 112, enlarged 4 times", LINE, text_font)
        sheet.paste(small, (x, 280))
    return sheet


def crossing(city):
    """One intersection with three landmarks, in a city's style; the streets form a tilted grid."""
    nodes = []
    for x in range(-210, 211, 70):
        for y in range(-210, 211, 70):
            nodes.append((x + 0.14 * y, y - 0.14 * x))
    edges = []  # to the neighbours above and to the right, where there are some
    for node in range(49):
        if node % 7 < 6:
            edges.append((node, node + 1))
        if node + 7 < 49:
            edges.append((node, node + 7))
    signs = [
        Sign(-6, 9, "Bakery Aurora", "Bakery"),
        Sign(9, 8, "Cafe Luna", "Cafe"),
        Sign(-8, -9, "Hotel Regal", "Hotel"),
    ]
    return Scene(tuple(nodes), tuple(edges), signs, city, "docs")


def cities():
    """One intersection in all the cities, one view at the paper's size, the landmarks' icons."""
    sheet = Image.new("RGB", (3 * 408 + 8, 3 * 432 + 500), WHITE)
    draw = ImageDraw.Draw(sheet)
    for place, city in enumerate(CITIES):
        x = 8 + 408 * (place % 3)
        y = 26 + 432 * (place // 3)
        draw.text((x, y - 21), city, INK, font(16))
        sheet.paste(street_views(crossing(city), 0, 0, 8, 400), (x, y))

    last = list(CITIES)[-1]
    front = street_views(crossing(last), 0, 0, 8, 901).crop((0, 0, 448, 448))
    draw.text((8, 1301), f"{last}, one view of 901 x 901", INK, font(16))
    sheet.paste(front, (8, 1324))

    for place, (category, icon) in enumerate(ICONS.items()):
        x = 540 + 152 * (place % 5)
        y = 1362 + 112 * (place // 5)
        paint_glyph(draw, icon, x, y, 0.36, ink=INK, board=WHITE)
        draw.text((x, y + 50), category, INK, font(15), "mm")
    return sheet


def walk():
    """A walk that fills two rows of four views and has something to see on the way."""
    env = Navigation(split="unseen", milestones=(3, 3), image_size=430)
    for seed in range(200):
        env.reset(seed)
        landmarks = [landmark for landmark in env.route.landmarks if landmark]
        if len(env.rail) == 8 and len(landmarks) > 1:
            return env
    raise LookupError("no route of eight positions with two landmarks among 200")


def route():
    """A walk with its instructions, position by position, with what is right under both rules."""
    env = walk()
    wide, high = 442, 494  # of a view with its two lines of text
    top = 30 + 19 * len(env.instructions)
    sheet = Image.new("RGB", (4 * wide + 12, top + 2 * high + 10), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(15), ImageFont.load_default(13)
    for row, text in enumerate(env.instructions):
        draw.text((14, 12 + 19 * row), f"{row + 1}. {text}", "black", large)
    while not env.done:
        x = 12 + wide * (env.at % 4)
        y = top + high * (env.at // 4)
        actions = dict.fromkeys(env.action(rule) for rule in RULES)  # one where both rules agree
        draw.text((x, y), f"{env.at + 1}. {'  |  '.join(actions)}", "black", large)
        draw.text((x, y + 20), env.rail[env.at].observation, "#666666", small)
        sheet.paste(env.image, (x, y + 42))
        env.step(env.expert())
    return sheet.quantize(256, dither=Image.Dither.NONE)


def episode():
    """The cards of README's episode as the model sees them, enlarged three times."""
    env = GeneralPoints(split="all", image_size=[112, 112])
    observation, _ = env.reset(EPISODE)
    return observation["image"].resize((336, 336), Image.Resampling.NEAREST)


def main():
    """Draw all pictures into docs/."""
    for picture in (cards, tables, episode, cities, route):
        path = ROOT / "docs" / f"{picture.__name__}.png"
        picture().save(path, optimize=True)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
