"""A norm behind the encoder, with a bias, gives padding zeros all the same."""

import pytest

from . import family_cases as cases

KIND = "roberta-prelayernorm"


@pytest.mark.parametrize("mask", list(cases.MASKS))
def test_same_hidden_states_and_gradients(mask: str) -> None:
    cases.assert_same(cases.model_of(KIND), cases.inputs_of(mask))


def test_hidden_states_of_all_layers() -> None:
    cases.assert_same_hidden_states_of_all_layers(cases.model_of(KIND), cases.inputs_of("both"))


def test_packed_outputs() -> None:
    cases.assert_same_packed_outputs(cases.model_of(KIND))


def test_a_question_answering_head() -> None:
    """No answer lies at padding."""
    cases.assert_same_heads(cases.head_of(KIND, "RobertaPreLayerNormForQuestionAnswering"))
