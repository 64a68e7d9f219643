"""Pictures of cards, read back by a reader that knows how playing cards look, not cards.py.

Ranks are matched with glyphs set here, suits told apart by colour and outline, pips counted by a
flood fill.
"""

import hashlib
import os
import random
import re
import subprocess
import sys
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from scenery import cards
from scenery.cards import RANKS, SUITS, draw_card, draw_table

ROOT = Path(cards.__file__).resolve().parent.parent
PACK = [(rank, suit) for rank in RANKS for suit in SUITS]
HANDS = [PACK[i : i + 4] for i in range(0, 52, 4)]
SMALL = [PACK[i::13] for i in range(13)]  # the pack again, other neighbours
DEAL = [("K", "spades"), ("10", "hearts"), ("A", "clubs"), ("7", "diamonds")]


# ---------------------------------------------------------------- names of cards
WORDS = "ace two three four five six seven eight nine ten jack queen king".split()
LETTERS = [*"A23456789TJQK"]


def test_every_spelling_of_every_card_is_read():
    """By words, letters and symbols, the suit behind or before or not said."""
    symbols = dict(zip("spades clubs hearts diamonds".split(), "♠♣♥♦"))
    for rank, word, letter in zip(RANKS, WORDS, LETTERS):
        for spelt in (rank, word, letter, word.upper(), f" {rank.lower()} "):
            assert cards.read_card(spelt) == (rank, None)
        for suit, symbol in symbols.items():
            for spelt in (f"{rank}{symbol}", f"{symbol}{rank}", f"{letter}{suit[0]}",
                          f"{word} of {suit}", f"{rank} {suit}", f"{suit[:-1].title()}-{letter}"):
                assert cards.read_card(spelt) == (rank, suit), spelt


@pytest.mark.parametrize("text", ["", "11", "0", "1 0", "joker", "spades", "♠", "KK", "♠K♠", "K of",
                                  "card", "of", "Κ", "１", "k" * 10_000, "\ud800"])
def test_what_names_no_card_is_none(text):
    assert cards.read_card(text) == ("", None)


# ---------------------------------------------------------------- a reader of its own
def runs(flags):
    """[(start, end)] of the stretches of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(flags, int), [0]])))
    return list(zip(edges[::2], edges[1::2]))


def cut_out(table):
    """(height, width, 3) pixels of every card on an unjittered table.

    A card is what is not the colour of the table's top left pixel.
    """
    pixels = np.asarray(table).astype(int)
    card = np.abs(pixels - pixels[0, 0]).sum(2) > 60
    top, bottom = np.flatnonzero(card.any(1))[[0, -1]]
    return [pixels[top : bottom + 1, a:b] for a, b in runs(card.any(0))]


def ink(pixels):
    """Black or red, neither paper nor the grey of the border."""
    return pixels[..., 1] < 110


def blobs(mask):
    """Sizes of the connected parts of a mask, corners counting as contact: flood fill."""
    left, sizes = set(zip(*np.nonzero(mask))), []
    while left:
        todo, size = [left.pop()], 0
        while todo:
            y, x = todo.pop()
            size += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        sizes.append(size)
    return sizes


def trim(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def normal(mask):
    """A mask cropped to its ink and brought to 24 x 36, as floats."""
    image = Image.fromarray(trim(mask).astype(np.uint8) * 255).resize(
        (24, 36), Image.Resampling.BILINEAR
    )
    return np.asarray(image).astype(float) / 255


@lru_cache(maxsize=None)
def template(rank):
    image = Image.new("L", (400, 300))
    ImageDraw.Draw(image).text((50, 20), rank, 255, ImageFont.load_default(160), stroke_width=5)
    return normal(np.asarray(image) > 127)


def read_suit(pixels):
    """Suit of a lone upright symbol.

    Red and alike upside down, it is a diamond; black with a waist under the top, a club.
    """
    shape = trim(ink(pixels))
    if np.median(pixels[ink(pixels)][:, 0]) > 120:
        return (
            "diamonds"
            if (shape & shape[::-1]).sum() > 0.9 * (shape | shape[::-1]).sum()
            else "hearts"
        )
    widths = shape.sum(1)[: shape.sum(1).argmax()]  # from the top to the widest row
    return (
        "clubs"
        if (np.maximum.accumulate(widths) - widths).max() > 0.07 * shape.shape[1]
        else "spades"
    )


def read_card(index):
    """(rank, suit) of an index: the rank above its suit, parted by a row without ink."""
    (a, b), *_, (c, d) = runs(ink(index).any(1))
    rank = normal(ink(index[a:b]))
    return min(RANKS, key=lambda r: np.square(rank - template(r)).mean()), read_suit(index[c:d])


# ---------------------------------------------------------------- what is on a card
@pytest.mark.parametrize("turned", [False, True], ids=["top left", "bottom right"])
def test_large_cards_are_read_from_either_corner(turned):
    for hand in HANDS:
        pictures = cut_out(draw_table(hand, 1200, 600))
        assert len(pictures) == 4
        for (rank, suit), picture in zip(hand, pictures):
            picture = picture[::-1, ::-1] if turned else picture
            height, width, _ = picture.shape
            corner = picture[
                round(0.02 * height) : round(0.31 * height),
                round(0.02 * width) : round(0.205 * width),
            ]
            assert read_card(corner) == (rank, suit)


def test_small_cards_are_read():
    for hand in HANDS + SMALL:
        pictures = cut_out(draw_table(hand, 112, 112))
        assert [read_card(picture[1:-1, 1:-1]) for picture in pictures] == hand


def test_pips_are_counted():
    for rank, suit in PACK:
        picture = cut_out(draw_table([(rank, suit)] * 4, 1200, 600))[1]
        height, width, _ = picture.shape
        middle = picture[
            round(0.05 * height) : round(0.95 * height), round(0.21 * width) : round(0.79 * width)
        ]
        if rank.isdigit():
            pips = blobs(ink(middle)[::2, ::2])
            assert len(pips) == int(rank) and max(pips) < 1.1 * min(pips)
        elif rank == "A":
            assert len(blobs(ink(middle)[::2, ::2])) == 1 and read_suit(middle) == suit


def test_cards_without_a_middle_row_look_the_same_from_the_other_side():
    for suit in SUITS:
        for rank in ("2", "4", "10", "J", "Q", "K"):
            pixels = np.asarray(draw_card(rank, suit, 270)).astype(int)
            assert (
                np.abs(pixels - pixels[::-1, ::-1]).max(2) > 100
            ).mean() < 0.005  # rounding to a pixel


def test_courts_differ_from_each_other():
    """Beyond the index: in a fifth or more of the pixels of the middle."""
    for suit in SUITS:
        middle = {
            r: np.asarray(draw_card(r, suit, 270).convert("RGB")).astype(int)[40:340, 60:210]
            for r in "JQK"
        }
        for a, b in combinations("JQK", 2):
            assert (np.abs(middle[a] - middle[b]).max(2) > 60).mean() > 0.2


@pytest.mark.parametrize("width", [26, 270])
def test_rank_of_red_and_black_differs_in_colour_only(width):
    def coverage(rank, suit):
        green = np.asarray(draw_card(rank, suit, width).convert("RGB")).astype(float)[..., 1]
        part = green[2 : round(0.58 * len(green)), 2:-2] if width == 26 else green[15:68, 5:55]
        return (255 - part) / (255 - part.min())

    for rank in RANKS:
        for suit in SUITS:
            assert np.abs(coverage(rank, suit) - coverage(rank, "spades")).max() < 0.02


# ---------------------------------------------------------------- small cards stay apart
@pytest.fixture(scope="module")
def sprites():
    """(52, pixels) of the cards as cut from 112 x 112 tables, in the order of PACK."""
    return np.stack(
        [picture.ravel() for hand in HANDS for picture in cut_out(draw_table(hand, 112, 112))]
    )


def test_small_cards_differ_clearly(sprites):
    for i, j in combinations(range(52), 2):
        strong = (np.abs(sprites[i] - sprites[j]).reshape(-1, 3).max(1) > 100).sum()  # pixels
        assert strong >= (24 if PACK[i][0] != PACK[j][0] else 10), (
            PACK[i],
            PACK[j],
        )  # a suit is 12 pixels high


def test_small_cards_survive_noise(sprites):
    noise = np.random.default_rng(0)
    for _ in range(20):
        seen = sprites + noise.normal(0, 40, sprites.shape)
        distance = ((seen[:, None] - sprites[None]) ** 2).mean(2)
        assert (distance.argmin(1) == np.arange(52)).all()


# ---------------------------------------------------------------- same arguments, same pixels
def digest():
    pictures = [
        draw_table(DEAL, w, h, j)
        for w, h in ((1200, 600), (112, 112))
        for j in (None, random.Random(5))
    ]
    return hashlib.sha256(b"".join(p.tobytes() for p in pictures)).hexdigest()


def test_pixels_do_not_depend_on_process_or_hash_seed_or_cache():
    paths = [str(ROOT), str(ROOT / "tests")]
    script = f"import sys; sys.path[:0] = {paths}; import test_cards as t; print(t.digest())"
    others = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            text=True,
            capture_output=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    draw_card.cache_clear()
    cold = digest()
    assert others == {cold} and digest() == cold


def test_global_random_state_is_neither_read_nor_moved():
    random.seed(1)
    first, state = digest(), random.getstate()
    random.seed(2)
    assert digest() == first
    random.seed(1)
    digest()
    assert random.getstate() == state


# ---------------------------------------------------------------- jitter and sizes
def is_card(table):
    """Mask of what is not table; the canvas's outermost pixels must all be table."""
    pixels = np.asarray(table).astype(int)
    mask = np.abs(pixels - pixels[0, 0]).sum(2) > 12
    assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
    return mask


def test_jitter_is_off_by_default_and_drawn_from_the_given_generator():
    def jittered(seed):
        return draw_table(DEAL, 112, 112, random.Random(seed)).tobytes()

    plain = draw_table(DEAL, 112, 112).tobytes()
    assert plain == draw_table(DEAL, 112, 112, None).tobytes()
    assert jittered(0) == jittered(0)
    assert len({plain, *map(jittered, range(30))}) == 31


@pytest.mark.parametrize(
    "width, height, tables", [(112, 112, 40), (92, 32, 40), (333, 111, 8), (400, 200, 3)]
)
def test_jittered_cards_lie_apart_and_wholly_on_the_canvas(width, height, tables):
    areas = []
    for seed in range(tables):
        sizes = blobs(is_card(draw_table(DEAL, width, height, random.Random(seed))))
        assert len(sizes) == 4
        areas += sizes
    assert max(areas) < 2 * min(
        areas
    )  # none covered or cut; sizes differ by 15 % either way and by rounding


@pytest.mark.parametrize(
    "width, height, count",
    [
        (72, 25, 4),
        (333, 111, 4),
        (2000, 500, 4),
        (113, 97, 4),
        (60, 90, 2),
        (50, 300, 1),
        (640, 480, 1),
        (700, 100, 9),
        (1201, 599, 5),
    ],
)
def test_any_canvas(width, height, count):
    hand = (DEAL * 3)[:count]
    table = draw_table(hand, width, height)
    assert table.size == (width, height) and table.mode == "RGB"
    mask = is_card(table)
    columns, rows = runs(mask.any(0)), runs(mask.any(1))
    assert len(columns) == count and len(rows) == 1
    (top, bottom), wide = rows[0], {b - a for a, b in columns}
    assert len(wide) == 1 and abs((bottom - top) / wide.pop() - 1.4) < 0.05
    assert (
        abs(top - (height - bottom)) <= 1 and abs(columns[0][0] - (width - columns[-1][1])) <= count
    )


@pytest.mark.parametrize("jitter", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_too_small_a_canvas_names_one_that_is_large_enough(count, jitter):
    def draw(width, height):
        return draw_table((DEAL * 2)[:count], width, height, random.Random(0) if jitter else None)

    with pytest.raises(ValueError, match=r"\d+x\d+ pixels") as error:
        draw(8, 8)
    assert "\n" not in str(error.value)
    width, height = map(int, re.search(r"(\d+)x(\d+) pixels", str(error.value)).groups())
    assert draw(width, height).size == (width, height)
    for less in ((width - 1, height), (width, height - 2)):
        with pytest.raises(ValueError):
            draw(*less)


@pytest.mark.parametrize(
    "rank, suit",
    [
        ("1", "spades"),
        ("11", "hearts"),
        (10, "clubs"),
        ("a", "clubs"),
        ("A", "Spades"),
        ("A", "stars"),
        ("", ""),
        (None, None),
    ],
)
def test_unknown_cards(rank, suit):
    for draw in (
        lambda: draw_card(rank, suit, 100),
        lambda: draw_table([(rank, suit)] * 4, 112, 112),
    ):
        with pytest.raises(ValueError, match="no card") as error:
            draw()
        assert "\n" not in str(error.value)


def test_no_card_and_too_narrow_a_card():
    with pytest.raises(ValueError, match="at least one card"):
        draw_table([], 112, 112)
    with pytest.raises(ValueError, match="16 pixels"):
        draw_card("A", "spades", 15)


@pytest.mark.parametrize("width", [16, 26, 59, 60, 101, 270])
def test_card_image(width):
    card = draw_card("Q", "hearts", width)
    assert card.mode == "RGBA" and card.size == (width, round(1.4 * width))
    assert card is draw_card("Q", "hearts", width)  # drawn once
    alpha = np.asarray(card)[..., 3]
    assert (
        alpha[0, 0] < 255
        and alpha[len(alpha) // 2, width // 2] == 255
        and alpha[0, width // 2] == 255
    )
