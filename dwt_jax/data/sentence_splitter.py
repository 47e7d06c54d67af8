"""Rule-based sentence splitting. It is fast, and in doubtful cases it does not split."""

import re
from collections.abc import Iterator

# Ends that may also stand inside a sentence; the last is the Greek question mark.
_MAYBE_END = ".!?…‼‽⁇⁈⁉．﹒\u037e"
# Ends that need no white space after them: the other characters that Unicode calls sentence terminals
# (UAX #29, Sentence_Break=STerm), as the full stops of Chinese, Hindi and Urdu and the Arabic question mark.
_END = (
    "\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a\u104b\u1362"
    "\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b4e\u1b4f"
    "\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d-\u1b7f\u1c3b\u1c3c\u1c7e\u1c7f\u2cf9-\u2cfb\u2e2e\u2e3c\u2e53\u2e54"
    "\u2e60\u2e61\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9"
    "\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb\ufe12\ufe15\ufe16\ufe56\ufe57\uff01\uff1f\uff61"
    "\U00010a56\U00010a57\U00010f55-\U00010f59\U00010f86-\U00010f89\U00011047\U00011048"
    "\U000110be-\U000110c1\U00011141-\U00011143\U000111c5\U000111c6\U000111cd\U000111de\U000111df"
    "\U00011238\U00011239\U0001123b\U0001123c\U000112a9\U000113d4\U000113d5\U0001144b\U0001144c"
    "\U000115c2\U000115c3\U000115c9-\U000115d7\U00011641\U00011642\U0001173c-\U0001173e\U00011944"
    "\U00011946\U00011a42\U00011a43\U00011a9b\U00011a9c\U00011c41\U00011c42\U00011ef7\U00011ef8"
    "\U00011f43\U00011f44\U00016a6e\U00016a6f\U00016af5\U00016b37\U00016b38\U00016b44"
    "\U00016d6e\U00016d6f\U00016e98\U0001bc9f\U0001da88"
)
_CLOSING = r"""['"”’»)\]」』）】〕〉》〗〙〛〞〟］｝｠｣]"""
_OPENING = r"""['"“‘«(\[¿¡「『（【〔〈《〖〘〚〝［｛｟｢]"""
# An end, closing quotes and brackets, white space, and the first letter of the next sentence.
_SPACED_STOP = re.compile(r"""[.!?…]['"”’»)\]]*(\s+)(?=['"“‘«(\[¿¡]*(.))""")
_STOP = re.compile(
    rf"[{_END}][{_END}{_MAYBE_END}]*{_CLOSING}*\s*|[{_MAYBE_END}]{_CLOSING}*(\s*)(?={_OPENING}*(.))"
)
_LAST_WORD = re.compile(r"[^\s(\[\"“‘'«—–]*\Z")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # J, U.S, e.g
_ABBREVIATIONS = re.compile(
    r"""mr|mrs|ms|messrs|mme|mlle|dr|prof|rev|hon|gen|col|lt|capt|cmdr|maj|sgt|adm|gov|sen|rep|pres|supt|insp
    |atty|brig|esq|mgr|msgr|st|mt|ft|jr|sr|vs|cf|viz|ca|approx|dept|univ|assn|bros|e\.g|i\.e|a\.k\.a
    |jan|feb|mar|apr|jun|jul|aug|sept|sep|oct|nov|dec""",
    re.VERBOSE | re.IGNORECASE,
)
_BEFORE_NUMBERS = re.compile(r"nos?|figs?|eqs?|pp?|vols?|arts?|secs?|chap|ch|op|ver|lib|[bcd]", re.IGNORECASE)
_SENTENCE_START = re.compile(
    r"""(?:The|An?|In|On|At|It|He|She|They|We|I|This|That|These|Those|There|But|And|Or|If|As|For|To|When|While
    |After|Before|Since|However|His|Her|Its|Their|Our|My|By|From|With)\b""",
    re.VERBOSE,
)


def split_sentences(text: str, *, at_spaces: bool = False) -> list[str]:
    """Split a text into sentences, stripped and not empty.

    The end of a line always ends a sentence. Within a line, a sentence ends after `.`, `!`, `?` or `…` and
    any closing quotes and brackets, if white space follows and the next letter is not lower-case; but not
    after a known abbreviation or an initial. It also ends where `!`, `?` or `…` precede a letter of a script
    without case, and at the ends of other scripts, as `。`, `！`, `।` and `؟`, whatever follows. Only white
    space is dropped, and nothing is duplicated.

    Args:
        text: the text.
        at_spaces: split only at `.`, `!`, `?` and `…` with white space after them.
    """
    sentences = []
    pattern = _SPACED_STOP if at_spaces else _STOP
    for line in text.splitlines():
        start = 0
        for stop in pattern.finditer(line):
            if _is_sentence_end(line, stop):
                sentences.append(line[start : stop.end()].strip())
                start = stop.end()
        if last := line[start:].strip():
            sentences.append(last)
    return sentences


CUT_WINDOW = 10_000  # characters before a cut in which a better place for it is looked for


def last_cut(text: str, end: int) -> int:
    """Return the last good place to cut a text at or before `end`.

    It is the start of the last sentence before `end`, else the end of the last white space, else `end`.

    Args:
        text: the text.
        end: 0 to len(text). The result is 0 for 0 only.
    """
    start = max(0, end - CUT_WINDOW)
    window = text[start:end]
    if len(sentences := split_sentences(window)) > 1:
        return start + window.rindex(sentences[-1])
    if len(pieces := window.split()) > 1:
        return start + window.rindex(pieces[-1])
    return end


def cut_pieces(text: str, max_chars: int) -> Iterator[str]:
    """Cut a text into pieces of at most `max_chars` characters, between sentences or words if possible."""
    start = 0
    while len(text) - start > max_chars:
        piece = text[start : start + max_chars]
        piece = piece[: last_cut(piece, len(piece))]
        yield piece
        start += len(piece)
    yield text[start:] if start else text


def _is_sentence_end(line: str, stop: re.Match[str]) -> bool:
    next_char, position = stop[2], stop.start()
    if next_char is None:  # one of _END
        return True
    if not stop[1]:  # "你好!我是", but not "3.中" and "node.js"
        has_no_case = next_char.isalpha() and next_char.lower() == next_char.upper()
        return has_no_case and line[position] != "." and not line[position - 1 : position].isdigit()
    if next_char.islower():
        return False
    if line[position] != "." or line[position - 1 : position] == ".":  # "..." does not end an abbreviation
        return True
    last_word = _LAST_WORD.search(line, max(0, position - 20), position)
    assert last_word is not None  # the pattern matches the empty string
    word = last_word[0]
    if _ABBREVIATIONS.fullmatch(word):
        return False
    if next_char.isdigit() and _BEFORE_NUMBERS.fullmatch(word):
        return False
    if _INITIALS.fullmatch(word):
        # "J. Smith", but "in the U.S. The": letters with points between them end a sentence if the next
        # word is one that often begins sentences.
        return "." in word and _SENTENCE_START.match(line, stop.start(2)) is not None
    return True
