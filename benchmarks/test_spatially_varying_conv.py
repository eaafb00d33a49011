PREFIX = "spatially_varying_conv2d/"


def test_spatially_varying_conv(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} against fp64 is too large"
