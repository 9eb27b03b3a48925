"""What stands around a BabiLong text: instruction, worked examples, the form of the answer, the frame. The wording is ours.

As in the original, each part can be left out, people, rooms and things of the examples occur in no story, kinds 1 to 3 ask for
a sentence and kinds 4 and 5 for one word. A prompt without its text has at most 250 words and signs, within the 300 tokens that
lengths set aside for it.
"""

from __future__ import annotations

PARTS = ("instruction", "examples", "answer_format")
# An answer follows at once; the original ends with the question and leaves the rest to the chat template.
FRAME = "<context>\n{context}\n</context>\nQuestion: {question}\nAnswer:"

_HIDDEN = "Scattered through the text below, which is mostly about other things, are short statements {about}. "
_ONLY = "Answer the question that follows the text from those statements alone."
_CARRY = (
    " Whatever someone holds goes along when they change rooms; whatever they put down stays where it was put."
    " A person is in the last room they went to."
)


def _example(told: str, question: str, reply: str) -> str:
    return f"<example>\n{told} {question}\nAnswer: {reply}\n</example>"


_ONE_WORD = "Answer with one word, {what}, and stop there."

INSTRUCTIONS = {
    1: _HIDDEN.format(about="saying which room somebody went to")
    + _ONLY
    + " Where somebody went to several, the last one counts.",
    2: _HIDDEN.format(about="on where people went and what they picked up or put down") + _ONLY + _CARRY,
    3: _HIDDEN.format(about="on where people went and what they picked up or put down") + _ONLY + _CARRY,
    4: _HIDDEN.format(about="on how the rooms of a house lie to each other") + _ONLY,
    5: _HIDDEN.format(about="on people who walk about and hand things to each other")
    + _ONLY
    + " Of several, the last one counts.",
}

EXAMPLES = {
    1: (
        _example(
            "Igor ran to the attic. Wanda went to the porch. Igor walked to the cellar.",
            "In which room is Igor?",
            "Igor is now in the cellar.",
        ),
        _example("Wanda moved to the chapel. Igor went to the loft.", "In which room is Wanda?", "Wanda is now in the chapel."),
    ),
    2: (
        _example(
            "Igor went to the attic. Igor took the lamp. Igor ran to the porch.",
            "In which room is the lamp?",
            "The lamp is in the porch.",
        ),
        _example(
            "Wanda walked to the loft. Wanda lifted the drum. Wanda put down the drum. Wanda went to the cellar.",
            "In which room is the drum?",
            "The drum is in the loft.",
        ),
    ),
    3: (
        _example(
            "Igor took the lamp. Igor went to the attic. Wanda ran to the loft. Igor moved to the porch.",
            "In which room was the lamp before it came to the porch?",
            "Before the porch, the lamp was in the attic.",
        ),
        _example(
            "Wanda went to the loft. Wanda lifted the drum. Wanda walked to the cellar. Wanda put down the drum.",
            "In which room was the drum before it came to the cellar?",
            "Before the cellar, the drum was in the loft.",
        ),
    ),
    4: (
        _example(
            "The attic lies north of the porch. The porch lies north of the cellar.",
            "Which room lies north of the porch?",
            "attic",
        ),
        _example(
            "The loft lies west of the chapel. The cellar lies east of the chapel.",
            "Which room is the cellar east of?",
            "chapel",
        ),
    ),
    5: (
        _example(
            "Igor took the lamp. Igor handed the lamp to Wanda. Igor ran to the loft.",
            "To whom did Igor hand the lamp?",
            "Wanda",
        ),
        _example("Wanda lifted the drum. Wanda gave the drum to Boris.", "Who handed over the drum?", "Wanda"),
        _example("Boris went to the attic. Boris gave the lamp to Igor.", "What did Boris hand to Igor?", "lamp"),
    ),
}

ANSWER_FORMATS = {
    1: 'Answer with one sentence of the form "[person] is now in the [room]", and stop there.',
    2: 'Answer with one sentence of the form "The [thing] is in the [room]", and stop there.',
    3: 'Answer with one sentence of the form "Before the [later room], the [thing] was in the [earlier room]", and stop there.',
    4: _ONE_WORD.format(what="the name of a room"),
    5: _ONE_WORD.format(what="a name or a thing, without any explanation"),
}


def default_parts(qa: int) -> dict[str, str]:
    """Our wording for kind `qa` (1 to 5): the parts by name, and the `frame` with {context} and {question}."""
    return {
        "instruction": INSTRUCTIONS[qa],
        "examples": "\n".join(EXAMPLES[qa]),
        "answer_format": ANSWER_FORMATS[qa],
        "frame": FRAME,
    }
