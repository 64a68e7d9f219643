"""One language for what a setting accepts, spoken by the YAML's schema and by the environments.

A check is a function of a value. It returns the value in the type that is wanted, or raises a
ValueError whose text reads on from the setting's name: "'x' is not a number". `checked` puts the
name in front: "ppo.clip: 'x' is not a number". No torch in this file.
"""
import difflib
import os

INF = float("inf")


def nearest(name, names):
    """' (did you mean X?)' for the closest valid name, or ''."""
    close = difflib.get_close_matches(str(name), names, 1, 0.5)
    return f" (did you mean {close[0]}?)" if close else ""


class NamedError(ValueError):
    """A ValueError whose text starts with the name of the wrong setting."""


# ---------------------------------------------------------------- checks of one value
def whole(low=-INF, high=INF):
    """A whole number from low to high."""
    def check(value):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{value!r} is not a whole number")
        return _between(value, low, high)
    return check


def number(low=-INF, high=INF):
    """A number from low to high, as a float. YAML reads 1e-6 as text: that counts, too."""
    def check(value):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"{value!r} is not a number")
        try:
            converted = float(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{value!r} is not a number") from None
        return _between(converted, low, high)
    return check


def _between(value, low, high):
    if not low <= value <= high:
        raise ValueError(f"{value} is not between {low} and {high}")
    return value


def _instance(kind, name):
    def check(value):
        if not isinstance(value, kind):
            raise ValueError(f"{value!r} is not {name}")
        return value
    return check


def text(value):
    """Text that can name a file here, too."""
    _instance(str, "text")(value)
    if "\0" in value:
        raise ValueError(f"{value!r} holds a null character")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError(f"{value!r} cannot name a file in this locale; set PYTHONUTF8=1") from None
    return value


flag = _instance(bool, "true or false")
mapping = _instance(dict, "a mapping")


def choice(*names):
    """One of the names."""
    def check(value):
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"{value!r} is none of {', '.join(names)}")
        return value
    return check


# ---------------------------------------------------------------- checks made of others
def optional(accepts):
    """null, or what `accepts` does."""
    def check(value):
        return None if value is None else accepts(value)
    return check


def list_of(accepts, length=None):
    """A list of items that `accepts` takes, of any length or the one given."""
    def check(value):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{value!r} is not a list")
        if length is not None and len(value) != length:
            raise ValueError(f"{value!r} has not {length} items")
        return [accepts(item) for item in value]
    return check


def mapping_of(accepts):
    """Free names, each with a value that `accepts` takes."""
    def check(value):
        items = mapping(value).items()
        return {str(name): checked(name, item, accepts) for name, item in items}
    return check


def either(*checks):
    """What one of the checks accepts, tried in order."""
    def check(value):
        errors = []
        for accepts in checks:
            try:
                return accepts(value)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(" and ".join(errors))
    return check


# ---------------------------------------------------------------- settings with names
def checked(name, value, accepts):
    """The value of one setting as `accepts` returns it.

    Raises: NamedError that starts with the setting's name; names within names are joined by a dot.
    """
    try:
        return accepts(value)
    except NamedError as error:
        raise NamedError(f"{name}.{error}") from None
    except ValueError as error:
        raise NamedError(f"{name}: {error}") from None


def check_settings(settings, schema, prefix=""):
    """All settings checked against {name: check}, in the schema's order; any may be absent.

    Raises: ValueError for one that is unknown (with the nearest valid name) or wrong.
    """
    for name in settings:
        if name not in schema:
            raise ValueError(f"unknown key {prefix}{name}{nearest(name, schema)}")
    clean = {}
    for name, accepts in schema.items():
        if name in settings:
            clean[name] = checked(f"{prefix}{name}", settings[name], accepts)
    return clean


def fields(schema):
    """A mapping with exactly the keys of {name: check}."""
    def check(value):
        for name in schema:
            if name not in mapping(value):
                raise ValueError(f"{value!r} has no {name}")
        return check_settings(value, schema)
    return check
