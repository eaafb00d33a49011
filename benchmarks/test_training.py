from smis_models import benchmark as harness

CASES = [case for case in harness.cases("training", "") if "training" in case.name]


def test_training(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} is too large"
