SET = "evaluation"


def test_evaluation(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} is too large"
