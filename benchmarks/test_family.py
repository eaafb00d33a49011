"""The set ``family``: every generator of the zoo, reference and fused."""

SET = "family"


def test_family(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} is too large"
