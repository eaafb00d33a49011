PREFIX = "spectral_weight/"


def test_spectral_weight(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} against fp64 is too large"
