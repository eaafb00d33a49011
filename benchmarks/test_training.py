SET = "training"


def test_training(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} is too large"
