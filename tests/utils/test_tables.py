from mmorepa.utils.tables import counted, format_table


def test_table():
    rows = [('training form', '1,234', '0.5'), ('deployed', '7', '12.25')]
    assert format_table(('form', 'parameters', 'ms'), rows).splitlines() == [
        'form           parameters     ms',
        'training form       1,234    0.5',
        'deployed                7  12.25',
    ]


def test_texts_are_not_markup():
    text = format_table(('[bold]a', 'b'), [('[red]x[/red]', ':smile:')])
    assert '[bold]a' in text and '[red]x[/red]' in text and ':smile:' in text


def test_terminal_does_not_matter(monkeypatch):
    """A narrow or colourful terminal changes nothing about a log."""
    expected = format_table(('name', 'n'), [('x' * 100, '1')])
    monkeypatch.setenv('COLUMNS', '20')
    monkeypatch.setenv('FORCE_COLOR', '1')
    assert format_table(('name', 'n'), [('x' * 100, '1')]) == expected


def test_numbers_with_nouns():
    assert [counted(number, 'image') for number in (0, 1, 2)] == [
        *('0 images', '1 image', '2 images')
    ]
