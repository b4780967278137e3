"""Turns one row of the input into tokens, or says why it stays out.

Depends on the row, the tokenizer with its template and the length alone, so that any process may do it.
"""

from __future__ import annotations

from eagle_offline.errors import one_line
from eagle_offline.text.conversations import RowProblem, parse_conversation, parse_template_arguments, parse_tools
from eagle_offline.text.rows import Row
from eagle_offline.text.templates import ChatTemplate, Encoded
from eagle_offline.text.token_writer import EncodedRow, LeftOutRow
from eagle_offline.text.tokenised_rows import is_tokenised, parse_tokens

Outcome = EncodedRow | LeftOutRow

DETAIL_CHARACTERS = 500  # room for two excerpts of a rendering and the way out


def encode_row(row: Row, template: ChatTemplate, seq_length: int) -> Outcome:
    """Return the first `seq_length` tokens of a row, or why it is left out.

    Raises:
        MismatchError: The row is a conversation, and there is no template.
    """
    file = row.source.name
    if row.value is None:
        return LeftOutRow(file, row.row_number, row.reason or "unreadable", row.problem or "unreadable")
    try:
        encoded = _encoded(row.value, template)
    except RowProblem as problem:
        return LeftOutRow(file, row.row_number, problem.reason_code, one_line(problem.detail, DETAIL_CHARACTERS))
    input_ids, loss_mask = encoded.input_ids[:seq_length], encoded.loss_mask[:seq_length]
    # Nothing comes before the first token that it could be predicted from.
    if not loss_mask[1:].any():
        if encoded.loss_mask[1:].any():
            detail = f"the first {seq_length} of {len(encoded.input_ids)} tokens hold none of the assistant's"
            return LeftOutRow(file, row.row_number, "supervision-truncated", detail)
        return LeftOutRow(file, row.row_number, "no-supervised-token", "no token behind the first is the assistant's")
    return EncodedRow(input_ids, loss_mask, row.row_number, len(input_ids) < len(encoded.input_ids), encoded.notes)


def _encoded(value: dict, template: ChatTemplate) -> Encoded:
    if is_tokenised(value):
        return parse_tokens(value, template.vocab_size)
    return template.encode(parse_conversation(value), parse_tools(value), parse_template_arguments(value))
