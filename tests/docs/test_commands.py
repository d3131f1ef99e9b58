"""Every command of the documents is given to the parser of its tool.

Configs are read with the options that stand beside them. The tools themselves run in
tests/tools.
"""

import os
import re
import subprocess

import pytest
import torch
from documents import DOCUMENTS, NAMES, commands, printed_configs
from tool_runs import ROOT, tool
from torch.distributed.run import get_args_parser

from mmorepa.__main__ import COMMANDS as TOOLS
from mmorepa.hub import get_config

COMMANDS = commands()
# Configs of the reader's own, by the documents that print them.
PRINTED = {n: printed_configs(path.read_text()) for n, path in zip(NAMES, DOCUMENTS)}


def each(choose):
    """Parametrizes by the commands of a kind."""
    chosen = [command for command in COMMANDS if choose(command)]
    ids = [f'{command.document}-{i}' for i, command in enumerate(chosen)]
    return pytest.mark.parametrize('command', chosen, ids=ids)


def starts_with(*start):
    return lambda command: tuple(command.words[: len(start)]) == start


def is_tool(command):
    return command.words[0] == 'python' and command.words[1].endswith('.py')


def is_shell_tool(command):
    return command.words[0] == 'bash'


def is_of_the_reader(config, document):
    """Whether the reader replaces this name, or writes the file."""
    return config in ('CONFIG', 'deployed_config.py', *PRINTED[document])


def check_tool(document, words):
    """Gives the arguments of a tool to its parser, and reads its config."""
    name, *arguments = words
    assert (ROOT / name).is_file()
    parse = getattr(tool(name.removeprefix('tools/')), 'parse_args', None)
    if parse is None:
        assert not arguments, f'{name} takes no arguments'
        return
    if not torch.cuda.is_available():  # That there is none, parsers say too.
        arguments = ['cpu' if word == 'cuda' else word for word in arguments]
    args = parse(arguments)
    config = getattr(args, 'config', None)
    if isinstance(config, str) and not is_of_the_reader(config, document):
        path = ROOT / config  # Or the name of a config.
        options = getattr(args, 'cfg_options', None)
        get_config(str(path) if path.is_file() else config, options)


@each(is_tool)
def test_tools_take_their_arguments(command):
    check_tool(command.document, command.words[1:])


@each(starts_with('torchrun'))
def test_torchrun(command):
    args = get_args_parser().parse_args(command.words[1:])
    script, arguments = args.training_script, args.training_script_args
    if args.module:
        assert script == 'mmorepa'
        name, *arguments = arguments
        script = f'tools/{TOOLS[name]}'
    check_tool(command.document, [script, *arguments])


@each(is_shell_tool)
def test_shell_tools(command, tmp_path):
    """Those that start processes do so with a stand-in that tells its arguments."""
    _, script, *arguments = command.words
    subprocess.run(['bash', '-n', ROOT / script], check=True)
    if not script.startswith(('tools/dist_', 'tools/slurm_')):
        # Each of these refuses what it does not know, by name.
        text = (ROOT / script).read_text()
        assert all(re.search(rf'(?m)^ *{a}\)', text) for a in arguments)
        return
    for name in ('python', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
    printed = subprocess.run(
        ['bash', script, *arguments],
        cwd=ROOT,
        env={**os.environ, 'PATH': path, **command.variables},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    if 'slurm' in script:
        gpus = command.variables['GPUS']
        assert f'--ntasks={gpus}' in printed
        check_tool(command.document, printed[printed.index('-u') + 1 :])
        return
    assert printed[:2] == ['-m', 'torch.distributed.run']
    args = get_args_parser().parse_args(printed[2:])
    assert args.nproc_per_node == arguments[1 + ('dist_test' in script)]
    assert args.nnodes == command.variables.get('NNODES', '1')
    check_tool(command.document, [args.training_script, *args.training_script_args])
