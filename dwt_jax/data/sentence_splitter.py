"""Rule-based sentence splitting. It is fast, and when in doubt leaves two sentences together."""

import re

# A stop, closing quotes and brackets, white space, and the first letter of the next sentence.
_STOP = re.compile(r"""[.!?…]['"”’»)\]]*\s+(?=['"“‘«(\[¿¡]*(.))""")
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


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences, stripped and not empty.

    The end of a line always ends a sentence. Within a line, a sentence ends after `.`, `!`, `?` or `…` and
    any closing quotes and brackets, if white space follows and the next letter is not lower-case; but not
    after a known abbreviation or an initial. Only white space is dropped, and nothing is duplicated.
    """
    sentences = []
    for line in text.splitlines():
        start = 0
        for stop in _STOP.finditer(line):
            if _is_sentence_end(line, stop):
                sentences.append(line[start : stop.end()].strip())
                start = stop.end()
        if last := line[start:].strip():
            sentences.append(last)
    return sentences


def _is_sentence_end(line: str, stop: re.Match[str]) -> bool:
    next_char = stop[1]
    if next_char.islower():
        return False
    position = stop.start()
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
        return "." in word and _SENTENCE_START.match(line, stop.start(1)) is not None
    return True
