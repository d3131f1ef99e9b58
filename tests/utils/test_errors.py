from mmorepa.utils.errors import describe_misfit, name_keys


def test_names_keys():
    assert name_keys('missing', []) == ''
    assert name_keys('missing', {'b'}) == '1 key missing: b'
    assert name_keys('missing', {'b', 'a'}) == '2 keys missing: a, b'
    assert name_keys('left', 'fedcba', most=2) == '6 keys left: a, b and 4 more'
    assert name_keys('left', 'dcba') == '4 keys left: a, b, c, d'


def test_describes_a_misfit():
    expected = dict(a=(1,), b=(2, 3), c=(4,))
    assert describe_misfit(expected, dict(expected)) == ''
    assert describe_misfit(expected, dict(b=(2, 4), c=(4,), d=())) == (
        '1 key missing: a; 1 key left over: d; 1 key of another shape: b (2, 4), '
        'not (2, 3)'
    )
