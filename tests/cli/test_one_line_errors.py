import pytest

from mmorepa.cli import one_line_errors
from mmorepa.utils.errors import CheckpointError


@pytest.mark.parametrize(
    'error, text',
    [
        (ValueError('is bad'), 'error: is bad'),
        (FileNotFoundError('no file'), 'error: no file'),
        (FileNotFoundError(2, 'No such file', 'a'), "[Errno 2] No such file: 'a'"),
        (KeyError('X is not in the registry'), 'error: X is not in the registry'),
        (CheckpointError('several\n\tlines\n'), 'error: several lines'),
    ],
)
def test_exits(error, text):
    with pytest.raises(SystemExit) as info, one_line_errors():
        raise error
    assert str(info.value).startswith('error: ') and '\n' not in str(info.value)
    assert str(info.value).endswith(text)


@pytest.mark.parametrize(
    'error', [TypeError('a mistake of ours'), KeyError('model'), AssertionError()]
)
def test_says_more_where_the_text_says_little(error):
    with pytest.raises(SystemExit) as info, one_line_errors():
        raise error
    start = f'error: {type(error).__name__}: '
    assert str(info.value).startswith(start)
    assert str(info.value).endswith('(MMOREPA_TRACEBACK=1 shows where)')


def test_traceback(monkeypatch):
    monkeypatch.setenv('MMOREPA_TRACEBACK', '1')
    with pytest.raises(ValueError), one_line_errors():
        raise ValueError('bad')
