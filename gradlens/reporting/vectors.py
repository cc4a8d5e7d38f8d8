"""Smaller SVG: the drawing stays, what matplotlib writes again and again is written once.

Numbers are rounded to a hundredth of a point, styles become classes, and each text that stands in a picture several
times, such as the number in the cells of a heat map, is one symbol that is used several times.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import count
from xml.etree import ElementTree as ET

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
DECIMAL = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
STEP = re.compile(r"([A-Za-z])([^A-Za-z]*)")
SHIFT = re.compile(r"translate\((\S+) 0\)")
PAUSE = re.compile("(?<=[:;]) ")  # in a style
GEOMETRY = ("d", "transform", "x", "y", "points", "width", "height")


def compact(svg: str) -> str:
    """Rewrites a picture of matplotlib in fewer bytes.

    Parameters
    ----------
    svg : str
        What `Figure.savefig` wrote, with text as paths.

    Returns
    -------
    str
        The same drawing, to a hundredth of a point, without its metadata.

    Examples
    --------
    >>> drawn = '<path d="M 1.23456 2 L 1.23456 9 z" style="fill: none"/>'
    >>> compact(f'<svg xmlns="http://www.w3.org/2000/svg"><defs><style/></defs>{drawn}</svg>').partition("</defs>")[2]
    '<path d="M1.23 2V9z" class="a"/></svg>'
    """
    root = ET.fromstring(svg, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    for child in root.findall(f"{SVG}metadata"):
        root.remove(child)
    definitions = root.find(f"{SVG}defs")
    if definitions is None:
        return svg
    for element in root.iter():
        _shorten(element)
    _share_texts(root, definitions)
    _share_clips(root)
    _share_styles(root, definitions)
    _name_shortly(root)
    _unwrap(root)
    ET.register_namespace("", SVG[1:-1])
    return re.sub(r" />", "/>", ET.tostring(root, encoding="unicode"))


def _shorten(element: ET.Element) -> None:
    """Rounds the numbers of an element, and drops the white space between elements."""
    element.tail = None
    if len(element) or element.tag != f"{SVG}style":
        element.text = element.text if element.tag is ET.Comment else None
    for name in GEOMETRY:
        if name in element.attrib:
            element.set(name, DECIMAL.sub(_rounded, element.get(name, "")))
    if "d" in element.attrib:
        element.set("d", _path(element.get("d", "")))
    if LINK in element.attrib:
        element.set("href", element.attrib.pop(LINK))
    if element.tag == f"{SVG}use" and (shift := SHIFT.fullmatch(element.get("transform", ""))):
        del element.attrib["transform"]
        element.set("x", shift[1])


def _rounded(match: re.Match[str]) -> str:
    """A number to 2 decimals, a small one, such as a scale, to 5."""
    value = float(match[0])
    text = f"{value:.{2 if abs(value) >= 1 else 5}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _path(d: str) -> str:
    """A path whose level and upright lines are written as such."""
    steps, at = [], ["", ""]
    for command, numbers in STEP.findall(d):
        to = numbers.split()
        if command == "L" and to[0] == at[0]:
            steps.append("V" + to[1])
        elif command == "L" and to[1] == at[1]:
            steps.append("H" + to[0])
        else:
            steps.append(command + " ".join(to))
        at = to[-2:] if to else ["", ""]
    return "".join(steps)


def _share_texts(root: ET.Element, definitions: ET.Element) -> None:
    """Moves the glyphs to the definitions, and with them each text that stands in several places."""
    groups: dict[tuple[tuple[str, str], ...], list[ET.Element]] = {}
    for group in root.iter(f"{SVG}g"):
        for inner in group.findall(f"{SVG}defs"):
            group.remove(inner)
            definitions.extend(inner)
        if len(group) and all(child.tag == f"{SVG}use" and set(child.attrib) <= {"href", "x"} for child in group):
            groups.setdefault(tuple((child.get("href", ""), child.get("x", "")) for child in group), []).append(group)
    for number, (glyphs, places) in enumerate(groups.items()):
        if len(glyphs) < 2 or len(places) < 2:
            continue
        symbol = ET.SubElement(definitions, f"{SVG}g", {"id": f"text-{number}"})
        symbol.extend(list(places[0]))
        for place in places:
            for child in list(place):
                place.remove(child)
            place.tag = f"{SVG}use"
            place.set("href", f"#text-{number}")


def _share_clips(root: ET.Element) -> None:
    """Clips a group where all of its elements are clipped alike."""
    for group in root.iter(f"{SVG}g"):
        clips = {child.get("clip-path") for child in group if child.tag is not ET.Comment}
        still = all("transform" not in child.attrib for child in group)
        if len(group) > 1 and len(clips) == 1 and None not in clips and still and "clip-path" not in group.attrib:
            group.set("clip-path", str(clips.pop()))
            for child in group:
                child.attrib.pop("clip-path", None)


def _unwrap(element: ET.Element) -> None:
    """Replaces groups without attributes by what they hold."""
    inside: list[ET.Element] = []
    for child in element:
        _unwrap(child)
        inside += list(child) if child.tag == f"{SVG}g" and not child.attrib else [child]
    element[:] = inside


def _share_styles(root: ET.Element, definitions: ET.Element) -> None:
    """Turns style attributes into classes of one style sheet."""
    sheet = definitions.find(f"{SVG}style")
    if sheet is None:
        return
    counts = Counter(element.get("style") for element in root.iter() if element.get("style"))
    names = {style: name for (style, _), name in zip(counts.most_common(), _names(), strict=False)}
    for element in root.iter():
        if style := element.attrib.pop("style", None):
            element.set("class", names[style])
    rules = [f".{name}{{{PAUSE.sub('', style or '')}}}" for style, name in names.items()]
    sheet.text = (sheet.text or "") + "".join(rules)


def _name_shortly(root: ET.Element) -> None:
    """Drops ids that nothing refers to, and gives the others short names, the most used the shortest."""
    refers = re.compile(r"^#(.+)$|^url\(#(.+)\)$")
    used: Counter[str] = Counter()
    for element in root.iter():
        for name, value in element.attrib.items():
            if name != "class" and (match := refers.match(value)):
                used[match[1] or match[2]] += 1
    short = {old: new for (old, _), new in zip(used.most_common(), _names(), strict=False)}
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.attrib.pop("id")
                if value in short:
                    element.set("id", short[value])
            elif match := refers.match(value):
                new = short[match[1] or match[2]]
                element.set(name, f"#{new}" if match[1] else f"url(#{new})")


def _names() -> Iterator[str]:
    """The names a, b, ..., z, a1, b1, ..."""
    for number in count():
        letter = chr(ord("a") + number % 26)
        yield letter if number < 26 else f"{letter}{number // 26}"
