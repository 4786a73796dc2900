r"""Units of measure and of money, and the things that are counted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

Powers = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: powers of base units and a factor, or the words for counted things."""

    powers: Powers
    factor: Fraction = Fraction(1)
    words: tuple[str, ...] = ()
    sure: bool = True
    """Whether it is no variable: `5m` may be five times m."""

    def same_kind(self, other: Unit) -> bool:
        """Whether both measure the same: lengths, or clips and paper clips."""
        if self.words or other.words:
            shorter, longer = sorted((self.words, other.words), key=len)
            ends = longer[len(longer) - len(shorter) :] == shorter
            return bool(shorter) and ends and "of" not in longer[: len(longer) - len(shorter)]
        return self.powers == other.powers


PERCENT = Unit((("%", 1),), Fraction(1, 100))
DEGREE = Unit((("degree", 1),))
RADIAN = Unit((("radian", 1),))

_PREFIXES = {"k": 3, "c": -2, "m": -3, "d": -1, "µ": -6, "u": -6, "n": -9, "M": 6, "G": 9, "h": 2}
_LONG = {"kilo": 3, "centi": -2, "milli": -3, "deci": -1, "micro": -6, "nano": -9, "mega": 6}
_LONG |= {"giga": 9, "hecto": 2}

_Entry = tuple[str, int, Fraction]  # base unit, its power, factor
_UNITS: dict[str, list[_Entry]] = {}


def _add(names: str, base: str, factor: Fraction | int | str = 1, power: int = 1) -> None:
    for name in names.split(","):
        _UNITS.setdefault(name, []).append((base, power, Fraction(factor)))


def _add_metric(
    short: str, long: str, base: str, factor: Fraction | int = 1, power: int = 1
) -> None:
    for prefix, ten in [("", 0), *_PREFIXES.items()]:
        _add(prefix + short, base, Fraction(10) ** ten * factor, power)
    for prefix, ten in [("", 0), *_LONG.items()]:
        for name in long.split(","):
            _add(prefix + name, base, Fraction(10) ** ten * factor, power)


_add_metric("m", "meter,metre", "m")
_add_metric("g", "gram,gramme", "g")
_add_metric("s", "second", "s")
_add_metric("L", "liter,litre", "m", Fraction(1, 1000), 3)
_add("l,cl,ml,dl", "m", 0, 3)
for _name, _factor in {"l": 1000, "cl": 100_000, "ml": 1_000_000, "dl": 10_000}.items():
    _UNITS[_name] = [("m", 3, Fraction(1, _factor))]
_add_metric("J", "joule", "J")
_add_metric("W", "watt", "W")
_add_metric("N", "newton", "N")
_add_metric("V", "volt", "V")
_add_metric("A", "ampere,amp", "A")
_add_metric("Hz", "hertz", "Hz")
_add_metric("Pa", "pascal", "Pa")
_add_metric("mol", "mole", "mol")
_add_metric("B", "byte", "byte")
_add("bit", "bit")
_add("ohm,Ω", "ohm")
_add("K,kelvin", "K")
_add("°C,celsius,centigrade,degree celsius,degree centigrade", "°C")
_add("°F,fahrenheit,degree fahrenheit", "°F")
_add("sec", "s")
_add("min,minute", "s", 60)
_add("h,hr,hour", "s", 3600)
_add("d,day", "s", 86_400)
_add("week,wk", "s", 604_800)
_add("month", "month")
_add("yr,year", "month", 12)
_add("decade", "month", 120)
_add("century,centurie", "month", 1200)
_add("in,inch,inche", "m", "0.0254")
_add("ft,foot,feet", "m", "0.3048")
_add("yd,yard", "m", "0.9144")
_add("mi,mile", "m", "1609.344")
_add("mph", "mph")  # two base units: see below
_add("oz,ounce", "g", "28.349523125")
_add("lb,pound", "g", "453.59237")
_add("ton,tonne,t", "g", 1_000_000)
_add("gal,gallon", "m", "0.003785411784", 3)
_add("quart,qt", "m", "0.000946352946", 3)
_add("pint,pt", "m", "0.000473176473", 3)
_add("cup", "cup")
_add("cc", "m", Fraction(1, 10**6), 3)
_add("acre", "m", "4046.8564224", 2)
_add("ha,hectare", "m", 10_000, 2)
_add("degree,deg,°", "degree")
_add("rad,radian", "radian")
_add("unit", "unit")
_add("%,percent,per cent,percentage,pct", "%", Fraction(1, 100))
_add("$,US$,USD,dollar,US dollar,buck", "USD")
_add("cent,¢,penny,pennie", "USD", Fraction(1, 100))
_add("€,EUR,euro", "EUR")
_add("£,GBP,pound,pound sterling", "GBP")
_add("¥,JPY,yen", "JPY")
_add("CNY,RMB,yuan", "CNY")
_add("₹,INR,Rs,Rs.,rupee", "INR")
_add("CHF,franc", "CHF")
_add("₩,KRW,won", "KRW")
_add("₽,RUB,ruble,rouble", "RUB")

_SPEEDS = {"kmph": "km/h", "kph": "km/h", "kmh": "km/h", "mph": "mi/h", "mps": "m/s"}
# What may be a variable, and what is none behind a space: 5 m, 5 m^2, 5 s.
_VARIABLE = re.compile(r"[mgsLlJWNVABKhdt](?:\s?\^.*)?")
_METRE = re.compile(r"m(?:\s?\^.*)?|[gsLJWNVAKh]")
# Words that join answers or change them: what holds one of them names no counted thing.
_JOINING = (
    "and or not to is are than plus minus times but over divided by mod between if then when where "
    "sin cos tan cot sec csc log ln exp sqrt pi max min lim gcd lcm det for all infinity "
    "more less most least under above below about squared cubed factorial doubled halved twice "
    "half halves third thirds quarters fourths fifths sixths eighths tenths hundredths "
    "alpha beta gamma delta theta lambda mu sigma omega phi"
)
_NO_THINGS = frozenset(_JOINING.split())
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "cu.": 3}
_AFTER = re.compile(r"\A(.*?)\s?(?:\^\s*+\{?\s*+(-?\d)\s*+\}?|\s(squared|cubed))$")


def units(text: str, attached: bool = False) -> list[Unit]:
    r"""All that a spelled unit can mean: pounds are masses and money. Empty if it is none.

    Args:
        text: The text behind the number.
        attached: Whether no space stands between them.

    Example:
        >>> [unit.powers for unit in units("km/h")], [unit.powers for unit in units("pounds")]
        ([(('m', 1), ('s', -1))], [(('g', 1),), (('GBP', 1),)])
    """
    text = text.strip().rstrip(".").strip()
    if not text or len(text) > 60:
        return []
    found = _product(text)
    if _VARIABLE.fullmatch(text) and (attached or not _METRE.fullmatch(text)):
        return [Unit(unit.powers, unit.factor, sure=False) for unit in found]
    return found or ([] if attached else _things(text))


def _product(text: str) -> list[Unit]:
    text = _SPEEDS.get(text.lower(), text)
    above, *below = re.split(r"\s*(?:/|\bper\b(?! cent))\s*", text)
    found = [Unit(())]
    for part, sign in [(above, 1), *((part, -1) for part in below)]:
        for name in re.split(r"\s*(?:\\cdot|\*|(?<=\w)-(?=\w))\s*", part):
            for single in [name] if _single(name) else name.split():  # m s^{-1}
                found = [_times(unit, more, sign) for unit in found for more in _single(single)]
    return [unit for unit in found if unit.powers]


def _times(unit: Unit, other: Unit, sign: int) -> Unit:
    powers = dict(unit.powers)
    for base, power in other.powers:
        powers[base] = powers.get(base, 0) + sign * power
    kept = tuple(sorted((base, power) for base, power in powers.items() if power))
    return Unit(kept, unit.factor * other.factor**sign)


def _single(name: str) -> list[Unit]:
    name, power = name.strip().strip("{}()").strip(), 1
    for word, value in _POWERS.items():
        if name.lower().startswith(f"{word} "):
            name, power = name[len(word) :].strip(), value
    if found := _AFTER.match(name):
        name = found[1].strip("{}() ")
        power *= int(found[2]) if found[2] else {"squared": 2, "cubed": 3}[found[3]]
    for candidate in _singulars(name):
        if candidate in _UNITS:
            return [
                Unit(((base, own * power),), factor**power)
                for base, own, factor in _UNITS[candidate]
            ]
    return []


def _singulars(name: str) -> list[str]:
    lower = re.sub(r"^(degree)s\b", r"\1", name.lower())
    lower = re.sub(r"^°\s*(?=[cf]$)", "°", lower)
    names = [name, name.replace("° ", "°"), lower, lower.upper() if lower[:1] == "°" else lower]
    if len(lower) > 2:
        names += [lower.removesuffix("s"), lower.removesuffix("es")]
    return names


def _things(text: str) -> list[Unit]:
    words = tuple(re.findall(r"[^\W\d_]+", text.lower()))
    plain = re.fullmatch(r"[^\W\d_]+(?:[ '-]+[^\W\d_]+){0,4}", text)
    if not plain or set(words) & _NO_THINGS or max(map(len, words)) < 3:
        return []
    return [Unit((), words=tuple(_singular(word) for word in words))]


def _singular(word: str) -> str:
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1 and not word.endswith("ss"):
            return word.removesuffix(ending) + instead
    return word
