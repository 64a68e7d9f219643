"""Student's t, and how many seeds a sign would take. No torch."""
from statistics import mean, stdev

POINTS = (  # 97.5 % points for 1 to 10 degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def student_t(freedom):
    """97.5 % point of Student's t; degrees of freedom (>= 1) are rounded down."""
    whole = int(freedom)
    return POINTS[whole - 1] if whole <= len(POINTS) else 1.96 + 2.6 / whole


def seeds_for_sign(differences, most=1000):
    """How many seeds it would take until the 95 % interval of their mean excludes 0, if mean and
    spread stay as in these.

    Args: differences: of two seeds or more, in points. Returns: 2 to `most`, None if more.
    """
    middle, spread = abs(mean(differences)), stdev(differences)
    for seeds in range(2, most + 1):
        if student_t(seeds - 1) * spread / seeds**0.5 < middle:
            return seeds
    return None
