"""Write an answer in one typography, before any comparison: unicode and plain text become LaTeX.

White space between two digits is kept, as one space: `3 1/2` is not `31/2`. Linear in the length of the text.
"""
from __future__ import annotations

import re
import unicodedata

_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|textit|textrm|textnormal|mbox|mathbf|mathit|boldsymbol|operatorname"
                      r"|emph|underline)\s*\{([^{}]*)\}")
_SUPERSCRIPT = "\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207d\u207e\u207f\u2071"
_SUBSCRIPT = "\u2080-\u208e"
_MINUS = dict.fromkeys(map(ord, "\u2212\u2013\u2014\u2010\u2011\ufe63\uff0d"), "-")
_SYMBOLS = {
    "\u221e": r"\infty ", "\u03c0": r"\pi ", "\u00d7": r"\cdot ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ",
    "\u2217": r"\cdot ", "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u2264": r"\leq ", "\u2265": r"\geq ",
    "\u2a7d": r"\leq ", "\u2a7e": r"\geq ", "\u2260": r"\neq ", "\u222a": r"\cup ", "\u2229": r"\cap ",
    "\u2205": r"\emptyset ", "\u2208": r"\in ", "\u2216": r"\setminus ", "\u00b1": r"\pm ", "\u2213": r"\mp ",
    "\u2248": r"\approx ", "\u2026": "...", "\u22ef": "...", "\u00b0": " degrees ", "\u00ba": " degrees ",
    "\u27e8": r"\langle ", "\u27e9": r"\rangle ", "\u2329": r"\langle ", "\u232a": r"\rangle ",
    "\u3008": r"\langle ", "\u3009": r"\rangle ",
    "\u2211": r"\sum ", "\u222b": r"\int ", "\u2220": r"\angle ", "\u25b3": r"\triangle ", "\u2032": "'",
    "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2115": r"\mathbb{N}", "\u211a": r"\mathbb{Q}",
    "\u2102": r"\mathbb{C}", "\u03b1": r"\alpha ", "\u03b2": r"\beta ", "\u03b3": r"\gamma ", "\u03b4": r"\delta ",
    "\u03b8": r"\theta ", "\u03bb": r"\lambda ", "\u03c6": r"\phi ", "\u03c9": r"\omega ", "\u2227": " and ",
    "\u2228": " or ", "\u00a2": " cents ", "\u20ac": " EUR ", "\u00a3": " GBP ", "\u00a5": " JPY ", "\u20b9": " INR "}
_NAMES = "pi|sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp|theta|alpha|beta|infty"
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?)(?![A-Za-z])\s*", ""),
    (r"\\(?:d|t|c)frac(?![A-Za-z])", r"\\frac"),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"\\mathbb\s*([A-Z])|\\R(?![A-Za-z])|\\(?:mathbf|mathrm)\{R\}(?=\s*(?:\\setminus|\\backslash|$))",
     lambda match: rf"\mathbb{{{match[1] or 'R'}}}"),
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
    (r"\\lbrace(?![A-Za-z])", r"\\{"), (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\(?:colon|ratio)(?![A-Za-z])", ":"), (r"\\(?:vert|lvert|rvert|mid)(?![A-Za-z])", "|"),
    (rf"(?<![\\A-Za-z])({_NAMES})(?![A-Za-z])", r"\\\1 "), (r"(?<=\d)(pi|sqrt)(?![A-Za-z])", r"\\\1 "),
    (r"\\(?:bar|overline)\s*\{(\d+)\}", r"\\overline{\1}"),
)]
_FRACTION_ARGUMENTS = re.compile(r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|[a-z](?![a-z])|\{)")
_ROOT_ARGUMENT = re.compile(r"\\sqrt\s*(?:(\d|[a-z](?![a-z]))|\(([^()]*)\))")
_EXPONENTIAL = re.compile(r"\\exp\s*(?:\(([^()]*)\)|\{([^{}]*)\})")
_POWER = re.compile(r"\^\s*\(([^()]*)\)")
_BASIS = re.compile(r"\\(?:mathbf|vec|boldsymbol|hat)\s*\{(?:\\mathbf\{)?\\?([ijk])(?:math)?\}+(?=\s*(?:[-+]|$))")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.S)
_DOLLARS = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)*)(?<!\\)\$\$?")


def typeset(answer: str) -> str:
    """Return an answer as LaTeX in one typography."""
    text = answer.strip()
    for _ in range(3):                              # $\boxed{5}$
        text = _DOLLARS.sub(lambda match: f" {match[1]} ", text).strip() if "$" in text else text
        text = re.sub(r"\\[\[\]()]", " ", text).strip() if re.match(r"\\[\[(]", text) else text
        text = match[1].strip() if (match := _BOX.fullmatch(text)) else text
    text = _ascii(text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _BASIS.sub(r"\\hat{\1}", text)
    for _ in range(4):
        text = _WRAPPER.sub(r" \1 ", text)
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).replace("\\%", "%")
    text = re.sub(r"\\?\$", " $ ", re.sub(r"(?<=\d)\s+[Rr](?:em\.?)?\s+(?=\d)", " remainder ", text))
    text = match[1] if (match := re.fullmatch(r"\s*\{([^{},]*)\}\s*", text)) else text
    text = _FRACTION_ARGUMENTS.sub(_braced, text)
    for pattern, replacement in ((_ROOT_ARGUMENT, lambda m: rf"\sqrt{{{m[1] or m[2]}}}"), (_POWER, r"^{\1}"),
                                 (_EXPONENTIAL, lambda m: f"e^{{{m[1] or m[2] or ''}}}")):
        text = pattern.sub(replacement, text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;").strip() if not text.strip().endswith("...") else text.strip()


def _ascii(text: str) -> str:
    """Translate unicode: powers, roots, fractions, digits and signs of any script."""
    if text.isascii():
        return text
    for signs, mark in ((_SUPERSCRIPT, "^"), (_SUBSCRIPT, "_")):
        text = re.sub(f"[{signs}]+", lambda run: f"{mark}{{{unicodedata.normalize('NFKC', run[0])}}}".translate(_MINUS),  # noqa: B023
                      text)
    for sign, root in (("\u221a", r"\sqrt"), ("\u221b", r"\sqrt[3]")):
        text = re.sub(sign + r"\s*(?:([\d.]+|[^\W\d])|\(([^()]*)\))",
                      lambda m: f"{root}{{{m[1] or m[2]}}}", text).replace(sign, root)  # noqa: B023
    return "".join(map(_character, text))


def _character(sign: str) -> str:
    if sign.isascii():
        return sign
    if sign in _SYMBOLS or ord(sign) in _MINUS:
        return _SYMBOLS.get(sign, "-")
    if unicodedata.decimal(sign, None) is not None:
        return str(unicodedata.decimal(sign))
    plain = unicodedata.normalize("NFKC", sign)
    if unicodedata.decomposition(sign).startswith("<fraction>"):
        top, _, bottom = plain.partition("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}" if bottom else sign
    return "".join(_SYMBOLS.get(part, part) for part in plain.translate(_MINUS))


def _braced(match: re.Match) -> str:
    r"""Give \frac12 and \frac{11}2 their braces."""
    top, bottom = (part if part.startswith("{") else f"{{{part}}}" for part in match.groups())
    return rf"\frac{top}{bottom}" if match[2] != "{" else rf"\frac{top}{{"


_BETWEEN = re.compile(r"(?<=[\d.]) (?=\d)| ")


def key(text: str) -> str:
    """Return a text as it is compared: spaces between digits only, small letters."""
    text = _BETWEEN.sub(lambda match: " " if text[match.start() - 1:match.start()].isdigit()
                        and text[match.end():match.end() + 1].isdigit() else "", text)
    text = re.sub(r"([_^])\{([A-Za-z0-9])\}", r"\1\2", text)
    return text.casefold() if len(text) > 1 and re.fullmatch(r"[A-Za-z,.;:'\-]+", text) else text
