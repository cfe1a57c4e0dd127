"""Write an answer in one typography, before any comparison: unicode and plain text become LaTeX.

White space between two digits is kept, as one space: `3 1/2` is not `31/2`. Linear in the length of the text.
"""
import re
import unicodedata

_SUPERSCRIPT = "\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207d\u207e\u207f\u2071"
_SUBSCRIPT = "\u2080-\u208e"
_SYMBOLS = str.maketrans({sign: latex for latex, signs in {
    "-": "\u2212\u2013\u2014\u2010\u2011\ufe63\uff0d", "/": "\u00f7\u2044\u2215", "...": "\u2026\u22ef", "'": "\u2032",
    r"\cdot ": "\u00d7\u22c5\u00b7\u2217", r"\pm ": "\u00b1", r"\mp ": "\u2213", r"\infty ": "\u221e",
    r"\leq ": "\u2264\u2a7d", r"\geq ": "\u2265\u2a7e", r"\neq ": "\u2260", r"\approx ": "\u2248",
    r"\cup ": "\u222a", r"\cap ": "\u2229", r"\emptyset ": "\u2205", r"\in ": "\u2208", r"\setminus ": "\u2216",
    r"\langle ": "\u27e8\u2329\u3008", r"\rangle ": "\u27e9\u232a\u3009", r"\sum ": "\u2211", r"\int ": "\u222b",
    r"\angle ": "\u2220", r"\triangle ": "\u25b3", r"\mathbb{R}": "\u211d", r"\mathbb{Z}": "\u2124",
    r"\mathbb{N}": "\u2115", r"\mathbb{Q}": "\u211a", r"\mathbb{C}": "\u2102", r"\pi ": "\u03c0",
    r"\alpha ": "\u03b1", r"\beta ": "\u03b2", r"\gamma ": "\u03b3", r"\delta ": "\u03b4", r"\theta ": "\u03b8",
    r"\lambda ": "\u03bb", r"\phi ": "\u03c6", r"\omega ": "\u03c9", " and ": "\u2227", " or ": "\u2228",
    " degrees ": "\u00b0\u00ba", " cents ": "\u00a2", " EUR ": "\u20ac", " GBP ": "\u00a3", " JPY ": "\u00a5",
    " INR ": "\u20b9"}.items() for sign in signs})


def _braced(match: re.Match) -> str:
    r"""Give \frac12 and \frac{11}2 their braces."""
    top, bottom = (part if part.startswith("{") else f"{{{part}}}" for part in match.groups())
    return rf"\frac{top}{bottom}" if match[2] != "{" else rf"\frac{top}{{"


_NAMES = "pi|sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp|theta|alpha|beta|infty"
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?)(?![A-Za-z])\s*", ""),
    (r"\\(?:d|t|c)frac(?![A-Za-z])", r"\\frac"),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"\\mathbb\s*([A-Z])|\\R(?![A-Za-z])|\\(?:mathbf|mathrm)\{R\}(?=\s*(?:\\setminus|\\backslash|$))",
     lambda match: rf"\mathbb{{{match[1] or 'R'}}}"),
    (r"\\(?:bf|rm|it|bfseries|small|[lL]arge|LARGE|[hH]uge|color\s*\{\w+\})(?![A-Za-z])\s*|"
     r"\\textcolor\s*\{\w+\}|\\\\\s*\Z", ""), (r"\A\*\*(.*)\*\*\Z", r"\1"),
    (r"\\cancel\s*\{[^{}]*\}", ""),
    (r"\\!\s*", ""),
    (r"(?<=\d)\s*\{,\}\s*(?=\d{3}(?!\d))", ","),
    (r"\s*\{,\}\s*", "{,}"),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\\[hv]?space\*?\{[^{}]*\}|\\phantom\{[^{}]*\}|&nbsp;|\s", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![A-Za-z])", " degrees "),
    (r"\\(?:varnothing|empty)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\leqslant|\\le(?![A-Za-z])|(?<![<=])<=(?!>)|=<", r"\\leq "), (r"\\geqslant|\\ge(?![A-Za-z])|>=", r"\\geq "),
    (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"),
    (r"\\not\s*=|\\ne(?![A-Za-z])|!=", r"\\neq "), (r"\\backslash(?![A-Za-z])", r"\\setminus "),
    (r"\\(?:times|ast)(?![A-Za-z])|(?<!\*)\*(?!\*)", r"\\cdot "), (r"\*\*", "^"), (r"\\div(?![A-Za-z])", "/"),
    (r"\\(?:ldots|dots|cdots|dotsc|dotsb)(?![A-Za-z])|\.{3,}", "..."),
    (r"(?<![\d.,])(\d{0,20}\.\d{0,20}?)(\d{1,6}?)\2{2,20}\.\.\.(?!\d)", r"\1\\overline{\2}"),  # 0.333..., three times
    (r"\\lbrace(?![A-Za-z])", r"\\{"), (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\(?:colon|ratio)(?![A-Za-z])", ":"), (r"\\(?:vert|lvert|rvert|mid)(?![A-Za-z])", "|"),
    (rf"(?<![\\A-Za-z])({_NAMES})(?![A-Za-z])", r"\\\1 "), (r"(?<=\d)(pi|sqrt)(?![A-Za-z])", r"\\\1 "),
    (r"\\(?:bar|overline)\s*\{(\d+)\}", r"\\overline{\1}"),
    (r"\\(?:mathbf|vec|boldsymbol|hat)\s*\{(?:\\mathbf\{)?\\?([ijk])(?:math)?\}+(?=\s*(?:[-+]|$))", r"\\hat{\1}"),
    *[(r"\\(?:text|mathrm|textbf|textit|textrm|textnormal|mbox|mathbf|mathit|boldsymbol|operatorname|emph|underline)"
       r"\s*\{([^{}]*)\}", r" \1 ")] * 4,                 # inside of each other
    (r"\\text\s*\{([^{}]*)\}", r" \1 "), (r"\\%", "%"),
    (r"(?<=\d)\s+[Rr](?:em\.?)?\s+(?=\d)", " remainder "), (r"\\?\$", " $ "),
    (r"\A\s*\{((?:[^{},]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}\s*\Z", r"\1"), (r"(?<=\d)\s*\\cdot\s+(?=i(?![A-Za-z]))", ""),
    (r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|[a-z](?![a-z])|\{)", _braced),
    (r"\\sqrt\s*(?:(\d|[a-z](?![a-z]))|\(([^()]*)\))", lambda match: rf"\sqrt{{{match[1] or match[2]}}}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\\exp\s*(?:\(([^()]*)\)|\{([^{}]*)\})", lambda match: f"e^{{{match[1] or match[2] or ''}}}"),
    (r"\\pounds(?![A-Za-z])", " GBP "), (r"\s+", " "), (r"\A ?(?:[Aa]n?|[Tt]he) (?=[A-Za-z]{3,} ?\Z)", ""))]
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.S)
_DOLLARS = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)*)(?<!\\)\$\$?")


def typeset(answer: str) -> str:
    """Return an answer as LaTeX in one typography."""
    text = answer.strip()
    for _ in range(3):                              # $\boxed{5}$
        text = _DOLLARS.sub(lambda match: f" {match[1]} ", text).strip() if "$" in text else text
        text = re.sub(r"\\[\[\]()]", " ", text).strip() if re.match(r"\\[\[(]", text) else text
        text = match[1].strip() if (match := _BOX.fullmatch(text)) else text
    text = text if text.isascii() else _ascii(text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    return text if text.endswith("...") else text.rstrip(".,;").strip()


def _ascii(text: str) -> str:
    """Translate unicode: powers, roots, fractions, digits and signs of any script."""
    for signs, mark in ((_SUPERSCRIPT, "^"), (_SUBSCRIPT, "_")):
        text = re.sub(f"[{signs}]+",
                      lambda run: f"{mark}{{{unicodedata.normalize('NFKC', run[0]).translate(_SYMBOLS)}}}", text)  # noqa: B023
    for sign, root in (("\u221a", r"\sqrt"), ("\u221b", r"\sqrt[3]")):
        text = re.sub(sign + r"\s*(?:([\d.]+|[^\W\d])|\(([^()]*)\))",
                      lambda m: f"{root}{{{m[1] or m[2]}}}", text).replace(sign, root)  # noqa: B023
    return re.sub(r"[^\0-\x7f]", _character, text.translate(_SYMBOLS))


def _character(match: re.Match) -> str:
    sign, plain = match[0], unicodedata.normalize("NFKC", match[0])
    if unicodedata.decimal(sign, None) is not None:
        return str(unicodedata.decimal(sign))
    if unicodedata.decomposition(sign).startswith("<fraction>"):
        top, _, bottom = plain.partition("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}" if bottom else sign
    return plain.translate(_SYMBOLS)


_BETWEEN = re.compile(r"(?<=[\d.]) (?=\d)| ")


def key(text: str) -> str:
    """Return a text as it is compared: spaces between digits only, small letters."""
    text = _BETWEEN.sub(lambda match: " " if text[match.start() - 1:match.start()].isdigit()
                        and text[match.end():match.end() + 1].isdigit() else "", text)
    text = re.sub(r"([_^])\{([A-Za-z0-9])\}", r"\1\2", text)
    return text.casefold() if len(text) > 1 and re.fullmatch(r"[A-Za-z,.;:'\-]+", text) else text
