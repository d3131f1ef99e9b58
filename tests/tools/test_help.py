"""What each command says of itself."""

import pytest
from tool_runs import tool

from mmorepa.__main__ import COMMANDS


@pytest.mark.parametrize('path', COMMANDS.values())
def test_every_command_has_help(path, capsys):
    module = tool(path)
    with pytest.raises(SystemExit) as exit:
        getattr(module, 'parse_args', module.main)(['--help'])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith('usage: ')
