from mmorepa.utils.errors import CheckpointError, name_keys


def test_names_keys():
    assert name_keys('missing', []) == ''
    assert name_keys('missing', {'b'}) == '1 key missing: b'
    assert name_keys('missing', {'b', 'a'}) == '2 keys missing: a, b'
    assert name_keys('left', 'fedcba', most=2) == '6 keys left: a, b and 4 more'
    assert name_keys('left', 'dcba') == '4 keys left: a, b, c, d'


def test_is_what_a_failing_load_raises():
    """So that whoever catches PyTorch's error catches this one, too."""
    assert issubclass(CheckpointError, RuntimeError)
