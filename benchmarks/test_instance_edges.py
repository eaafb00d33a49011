PREFIX = "instance_edges/"


def test_instance_edges(measured):
    assert measured.correct, f"error {measured.max_rel_error:.3e} against fp64 is too large"
