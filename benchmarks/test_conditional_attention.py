PREFIX = "conditional_attention/"


def test_conditional_attention(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} against fp64 is too large"
