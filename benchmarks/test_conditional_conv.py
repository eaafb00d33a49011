PREFIX = "conditional_conv2d/"


def test_conditional_conv(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} against fp64 is too large"
