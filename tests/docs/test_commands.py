"""Every command of the documents is given to what it calls, at reduced size.

All tools get the arguments as they are printed, and configs are read with the options
that stand beside them. What trains, tests and converts also runs, on a network and data
of a test. The other tools have reduced runs of their own in tests/tools.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
from documents import DOCUMENTS, NAMES, Command, commands, printed_configs
from helpers import import_models
from published_layout import resnet, trained_state
from tool_runs import (
    EXPORT,
    QUANTIZE,
    ROOT,
    SWITCH,
    run_here,
    run_runner,
    skip_timing,
    tool,
)
from torch.distributed.run import get_args_parser

from mmorepa.__main__ import COMMANDS as TOOLS
from mmorepa.runs import read_config

COMMANDS = commands()
# Configs of the reader's own, by the documents that print them.
PRINTED = {n: printed_configs(path.read_text()) for n, path in zip(NAMES, DOCUMENTS)}
# By switch_to_deploy.py.
WRITTEN = 'deployed_config.py'
EXECUTED = (
    'train.py',
    'test.py',
    SWITCH,
    'model_converters/plain_to_mmorepa.py',
    'model_converters/published_to_mmorepa.py',
    'analysis_tools/get_flops.py',
    EXPORT,
    QUANTIZE,
)


def each(choose, kind=''):
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
    return config in ('CONFIG', WRITTEN, *PRINTED[document])


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
        read_config(str(path) if path.is_file() else config, options)


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


CONFIG = """
_base_ = {base!r}

backbone = dict(
    base_channels={width}, init_cfg=dict(type='Pretrained', checkpoint='PATH')
)
model = dict(backbone=backbone, head=dict(in_channels=8 * {width}, num_classes=10))
data_root = 'data/digits'
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=32),
    dict(type='PackInputs'),
]
data = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val',
        indices=8,
        pipeline=pipeline,
    ),
)
train_dataloader = data
val_dataloader = data
test_dataloader = data
train_cfg = dict(max_epochs=1)
default_hooks = dict(checkpoint=dict(save_optimizer=False))
optim_wrapper = dict(optimizer=dict(lr=0.001))
"""
DEPLOYED = """
_base_ = 'config.py'
model = dict(backbone=dict(deploy=True))
"""


def narrow(state):
    """24 of 64 channels, but for those of images and classes."""
    parts = {
        name: tuple(slice(n * 24 // 64 if n > 10 else n) for n in value.shape[:2])
        for name, value in state.items()
    }
    return {name: value[parts[name]].clone() for name, value in state.items()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where the commands run, with the files that they name."""
    torchvision = pytest.importorskip('torchvision')
    import_models('mmpretrain')
    folder = tmp_path_factory.mktemp('commands')
    digits = tool('dataset_converters/digits.py')
    digits.write_image_folder(digits.split_digits(), folder / 'data/digits')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    base = str(ROOT / 'configs/imagenet/resnet18-orepa_4xb64_in1k.py')
    for name, width in (('config.py', 24), ('published.py', 4)):
        (folder / name).write_text(CONFIG.format(base=base, width=width))
    (folder / 'deployed.py').write_text(DEPLOYED)

    torch.manual_seed(0)
    plain = folder / 'resnet18.pth'
    torch.save(narrow(torchvision.models.resnet18(num_classes=10).state_dict()), plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convert = 'model_converters/plain_to_mmorepa.py'
        run_here(convert, plain, 'config.py', 'CHECKPOINT')
    published = resnet((2, 2, 2, 2), False, 4, 1, 64, 'orepa', classes=10)
    torch.save(trained_state(published), folder / 'ResNet-18-OREPA.pth.tar')
    for name in ('SOURCE', 'PATH'):
        (folder / name).symlink_to(plain)
    (folder / 'IN').symlink_to(folder / 'ResNet-18-OREPA.pth.tar')
    yield folder
    shutil.rmtree(folder)


def stand_in(word, document):
    """What a word of a command is in this test."""
    if word == WRITTEN:
        return word
    if is_of_the_reader(word, document) or word.startswith('configs/'):
        if '/deploy/' in word:
            return 'deployed.py'
        return 'published.py' if document == 'docs/weights.md' else 'config.py'
    if word == 'CHECKPOINT' or re.fullmatch(r'work_dirs/.*\.pth', word):
        return 'CHECKPOINT'
    return word


def executed() -> Iterator[Command]:
    """Each tool once with each set of flags, on the config of this test."""
    seen = set()
    for command in filter(is_tool, COMMANDS):
        name, *arguments = (w.removeprefix('tools/') for w in command.words[1:])
        words = [stand_in(word, command.document) for word in arguments]
        files = {word for word in words if word.isupper() or word == WRITTEN}
        key = name, *sorted(files | {w for w in words if w.startswith('--')})
        if name in EXECUTED and key not in seen:
            seen.add(key)
            yield command._replace(words=[name, *words])


@pytest.mark.slow
def test_they_run(folder, monkeypatch):
    """In the order of the documents: what one writes, the next may read."""
    skip_timing(monkeypatch)
    monkeypatch.chdir(folder)
    monkeypatch.setenv('LOCAL_RANK', '0')
    names = set()
    for command in executed():
        name, *words = command.words
        try:
            if name in ('train.py', 'test.py'):
                work_dir = f'work_dirs/{len(names)}'
                run_runner(name, *words, '--work-dir', work_dir)
            else:
                run_here(name, *words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f'{command.document}: {command.words}') from error
        names.add(name)
    assert names == set(EXECUTED)
