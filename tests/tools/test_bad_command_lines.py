"""Command lines that cannot work: each ends with one line, and destroys nothing.

``MMOREPA_COMMAND_LINES=200 pytest tests/tools/test_bad_command_lines.py`` for many.
"""

import os
import random
from collections import Counter

import pytest
import torch
from helpers import import_models
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tool_runs import run_here

from mmorepa.converters import write_checkpoint

LINES = int(os.environ.get('MMOREPA_COMMAND_LINES', 40))
SWITCH = 'model_converters/switch_to_deploy.py'
PUBLISHED = 'model_converters/published_to_mmorepa.py'
STEM_LR = 'analysis_tools/stem_lr.py'
SIMILARITY = 'analysis_tools/branch_similarity.py'
SHARES = 'analysis_tools/branch_shares.py'
CURVES = 'analysis_tools/training_curves.py'
SCALING = 'analysis_tools/scaling_experiment.py'
SWEEP = 'benchmarks/stem_lr_sweep.py'
FLOPS = 'analysis_tools/get_flops.py'
EXPORT = 'deployment/export_onnx.py'
QUANTIZE = 'deployment/quantize.py'
DRAW = 'analysis_tools/draw_predictions.py'
COST = 'benchmarks/train_cost.py'
DIGITS = 'dataset_converters/digits.py'
COMPATIBILITY = 'benchmarks/compatibility.py'

# Files by their name, and what is in them; CONFIG stands for a config that is good.
CONFIGS = {
    'no_model.py': 'x = 1\n',
    'empty.py': '',
    'number.py': 'model = 3\n',
    'syntax.py': 'model = dict(\n',
    'raises.py': 'model = dict(a=1 / 0)\n',
    'imports.py': "custom_imports = dict(imports=['no_such'])\nmodel = dict()\n",
    'base.py': "_base_ = './none.py'\n",
    'circle.py': "_base_ = './circle.py'\n",
    'bytes.py': b'\xff\xfe\x00',
    'list.json': '[1]',
    'broken.json': '{',
    'broken.yml': 'a: [',
    'notes.txt': 'model = dict()\n',
    'type.py': "_base_ = CONFIG\nmodel = dict(backbone=dict(type='OREPAResNett'))\n",
    'argument.py': '_base_ = CONFIG\nmodel = dict(backbone=dict(dpeth=18))\n',
    'block.py': "_base_ = CONFIG\nmodel = dict(backbone=dict(block='x'))\n",
    'none.py': None,
    '.': None,
    '': None,
    '/dev/null': None,
}
CHECKPOINTS = ('none.pth', '.', '', '/dev/null', 'notes.txt', 'empty.pth', 'cut.pth')
CHECKPOINTS += ('nan.pth', 'other.pth', 'list.pth', 'zeros.pth', 'none.safetensors')
OUTPUTS = ('.', '/dev/full', 'soft.pth', 'hard.pth', 'good.pth', 'notes.txt/a.pth')
OUTPUTS += ('circle.pth', 'x' * 300, '')

# Of the training and the test; '--cfg-options' comes before each.
OPTIONS = (
    'model',
    'model=3',
    'model=None',
    'model.backbone=OREPAResNet',
    'model.backbone.strides=(1,2',
    'model.backbone.depth.x=1',
    'model.backbone.depth=17',
    'model.backbone.dpeth=18',
    'model.backbone.block=none_of_these',
    'model.backbone.frozen_stages=9',
    'model.head.in_channel=3',
    'model.type=Classifier',
    'default_scope=mmpretrian',
    'work_dir=notes.txt',
    'work_dir=/dev/null/a',
    'custom_hooks.0.type=Nothing',
    'randomness.seed=x',
)
TRAINING_OPTIONS = (
    *(
        'model.backbone.init_cfg.type=Pretrained '
        f'model.backbone.init_cfg.checkpoint={name}.pth'
        for name in ('none', 'nan', 'cut', 'other')
    ),
    'optim_wrapper.type=AmpOptimWrapper',
    'optim_wrapper.type=OptimWraper',
    'optim_wrapper.optimizer.type=SDG',
    'optim_wrapper.optimizer.learning_rate=1',
    'optim_wrapper.optimizer.lr=-1',
    'optim_wrapper.paramwise_cfg.stem_lr_multt=2',
    'optim_wrapper.paramwise_cfg.norm_decay_mult=x',
    'optim_wrapper.paramwise_cfg=3',
    'param_scheduler.0.type=Nothing',
    'param_scheduler.0.start=1',
    'train_cfg.max_epochs=x',
    'train_cfg.max_epoch=3',
    'train_cfg=None',
    'train_dataloader.batch_size=0',
    'train_dataloader.num_workers=-1',
    'train_dataloader.sampler.type=Nothing',
    'train_dataloader.dataset.data_root=none',
    'train_dataloader.dataset.type=Nothing',
    'train_dataloader.dataset.pipeline.0.type=Nothing',
    'val_dataloader.dataset.data_root=none',
    'val_evaluator.type=Nothing',
    'load_from=none.pth',
    'load_from=nan.pth',
    'load_from=other.pth',
    'resume=True load_from=good.pth',
)


def lines():
    """Every bad command line: a tool and its arguments."""
    on_config = (
        ('train.py', '{}'),
        ('test.py', '{} good.pth'),
        (SWITCH, '{} good.pth out.pth'),
        (FLOPS, '{}'),
        (EXPORT, '{} good.pth out.onnx'),
        (QUANTIZE, '{} good.pth out.onnx'),
        (STEM_LR, '{} good.pth --out out.png'),
        (SIMILARITY, '{} good.pth --out out.png'),
        (SHARES, '{} good.pth --out out.png'),
        (DRAW, '{} good.pth good.pth out.png'),
        (COST, '{} --out out'),
    )
    on_checkpoint = (
        ('train.py', 'CONFIG --resume={}'),
        ('test.py', 'CONFIG {}'),
        (SWITCH, 'CONFIG {} out.pth'),
        (EXPORT, 'CONFIG {} out.onnx'),
        (QUANTIZE, 'CONFIG {} out.onnx'),
        (STEM_LR, 'CONFIG {} --out out.png'),
        (SIMILARITY, 'CONFIG {} --out out.png'),
        (SHARES, 'CONFIG {} --out out.png'),
        (STEM_LR, 'CONFIG good.pth --plain-checkpoint={} --out out.png'),
        (PUBLISHED, '{} out.pth'),
    )
    on_output = (
        ('test.py', 'CONFIG good.pth --out-item metrics --out={}'),
        (SWITCH, 'CONFIG good.pth {}'),
        (SWITCH, 'CONFIG good.pth out.pth --json={}'),
        (EXPORT, 'CONFIG good.pth {}'),
        (EXPORT, 'CONFIG good.pth out.onnx --json={}'),
        (QUANTIZE, 'CONFIG good.pth {}'),
        (QUANTIZE, 'CONFIG good.pth out.onnx --json={}'),
        (STEM_LR, 'CONFIG good.pth --out={}'),
        (SIMILARITY, 'CONFIG good.pth --out={}'),
        (SHARES, 'CONFIG good.pth --out={}'),
        (STEM_LR, 'CONFIG good.pth --out out.png --json={}'),
        (PUBLISHED, 'good.pth {}'),
    )
    for places, values in (
        (on_config, CONFIGS),
        (on_checkpoint, CHECKPOINTS),
        (on_output, OUTPUTS),
    ):
        for tool, line in places:
            for value in values:
                words = [word.replace('{}', value) for word in line.split(' ')]
                # An empty name after --resume is none, and so is one after --json.
                if words[-1] not in ('--resume=', '--json='):
                    yield tool, words
    for option in OPTIONS:
        yield 'train.py', ['CONFIG', '--cfg-options', *option.split()]
        yield 'test.py', ['CONFIG', 'good.pth', '--cfg-options', *option.split()]
        if 'model.backbone' in option:
            for tool in (SWITCH, STEM_LR):
                words = ['CONFIG', 'good.pth', *(['out.pth'] if tool == SWITCH else [])]
                yield tool, [*words, '--cfg-options', *option.split()]
    for option in TRAINING_OPTIONS:
        yield 'train.py', ['CONFIG', '--cfg-options', *option.split()]
    for tool, line in (
        ('train.py', ''),
        ('train.py', 'CONFIG CONFIG'),
        ('train.py', 'CONFIG --nothing'),
        ('train.py', 'CONFIG --launcher nothing'),
        ('train.py', 'CONFIG --launcher pytorch'),
        ('train.py', 'CONFIG --launcher slurm'),
        ('train.py', 'CONFIG --local-rank x'),
        ('train.py', 'CONFIG --work-dir notes.txt'),
        ('train.py', 'CONFIG --work-dir /dev/full'),
        ('train.py', 'config.py --work-dir .'),
        ('train.py', 'config.py --work-dir here'),
        ('test.py', 'config.py good.pth --work-dir .'),
        ('test.py', 'CONFIG'),
        ('test.py', 'CONFIG good.pth --out a.json'),
        ('test.py', 'CONFIG good.pth --out-item pred'),
        ('test.py', 'CONFIG good.pth --interval 0'),
        ('test.py', 'CONFIG good.pth --wait-time x'),
        ('test.py', 'CONFIG good.pth --out good.pkl'),
        ('test.py', 'CONFIG good.pth --out CONFIG --out-item metrics'),
        (SWITCH, 'CONFIG good.pth'),
        (SWITCH, 'CONFIG good.pth out.pth --shape 0 0'),
        (SWITCH, 'CONFIG good.pth out.pth --shape -1 8'),
        (SWITCH, 'CONFIG good.pth out.pth --shape 8 8 8'),
        (SWITCH, 'CONFIG good.pth out.pth --shape 8 x'),
        (SWITCH, 'CONFIG good.pth out.pth --tolerance x'),
        (SWITCH, 'CONFIG good.pth out.pth --tolerance nan'),
        (SWITCH, 'CONFIG good.pth out.pth --json out.pth'),
        (SWITCH, 'CONFIG good.pth out.pth --json ./out.pth'),
        (SWITCH, 'CONFIG good.pth out.pth --json CONFIG'),
        (SWITCH, 'CONFIG good.pth CONFIG'),
        (SWITCH, 'CONFIG good.pth mine.pth'),
        (SWITCH, 'CONFIG good.pth out.pth --json out_config.py'),
        (FLOPS, 'CONFIG --shape 0'),
        (FLOPS, 'CONFIG --shape 8 8 8'),
        (FLOPS, 'CONFIG --shape x'),
        (EXPORT, 'CONFIG good.pth'),
        (EXPORT, 'CONFIG good.pth out.onnx --exporter nothing'),
        (EXPORT, 'CONFIG good.pth out.onnx --shape 0 8'),
        (EXPORT, 'CONFIG good.pth out.onnx --opset x'),
        (EXPORT, 'CONFIG good.pth out.onnx --opset 1'),
        (EXPORT, 'CONFIG good.pth out.onnx --tolerance nan'),
        (EXPORT, 'CONFIG good.pth CONFIG'),
        (QUANTIZE, 'CONFIG good.pth'),
        (QUANTIZE, 'CONFIG good.pth out.onnx --images 0'),
        (QUANTIZE, 'CONFIG good.pth out.onnx --activations int4'),
        (QUANTIZE, 'CONFIG good.pth out.onnx --calibration nothing'),
        (QUANTIZE, 'CONFIG good.pth good.pth'),
        (QUANTIZE, 'CONFIG good.pth out.onnx --json out.onnx'),
        (STEM_LR, 'CONFIG good.pth --draws 0 --out out.png'),
        (STEM_LR, 'CONFIG good.pth --batches -1 --out out.png'),
        (STEM_LR, 'CONFIG good.pth --out out.png --json out.png'),
        (STEM_LR, 'CONFIG good.pth --batches x --out out.png'),
        (SIMILARITY, 'CONFIG'),
        (SHARES, 'CONFIG good.pth --images 3'),
        (CURVES, ''),
        (CURVES, 'none --out out.png'),
        (CURVES, 'notes.txt --out out.png'),
        (CURVES, '. --out out.png'),
        (SCALING, '--epochs 0'),
        (SCALING, '--seeds x'),
        (SCALING, '--out good.pth/a.png'),
        (SCALING, '--out .'),
        (SWEEP, '--tasks nothing'),
        (SWEEP, '--multipliers -1'),
        (SWEEP, '--seeds 0'),
        (SWEEP, '--report-only --out none'),
        (DRAW, 'CONFIG good.pth good.pth'),
        (DRAW, 'CONFIG good.pth good.pth out.png --images 0'),
        (DRAW, 'CONFIG good.pth good.pth good.pth'),
        (COST, '--device cuda:99'),
        (COST, '--device nothing'),
        (COST, '--batch-size 0'),
        (COST, '--batch-size 1 2 3'),
        (COST, '--rounds x'),
        (COST, '--threads 0'),
        (COST, '--size -3'),
        (COST, 'CONFIG --out notes.txt'),
        (COMPATIBILITY, '--only nothing --out out'),
        (COMPATIBILITY, '--tables nothing'),
        (PUBLISHED, 'good.pth'),
        (PUBLISHED, 'good.pth out.pth --arch ResNet-18'),
        (PUBLISHED, 'good.pth out.pth --arch VGG --block orepa'),
        (DIGITS, '--out notes.txt'),
        (DIGITS, '--out /dev/full'),
        (DIGITS, '--out linked'),
        (DIGITS, 'linked'),
        ('analysis_tools/quickstart_summary.py', '.'),
        (
            'analysis_tools/quickstart_summary.py',
            '. config.py good.pth --seconds 1 --training-seconds 1 '
            '--plain-training-seconds 1',
        ),
        ('analysis_tools/transfer_summary.py', '. --det-seconds 1 --seg-seconds 1'),
        ('analysis_tools/model_zoo.py', '--only nothing'),
    ):
        yield tool, line.split()


@pytest.fixture(scope='module')
def folder(config, tmp_path_factory):
    """Where the tools are run."""
    import_models('mmpretrain')
    folder = tmp_path_factory.mktemp('lines')
    for name, text in CONFIGS.items():
        if text is not None:
            text = text.encode() if isinstance(text, str) else text
            text = text.replace(b'CONFIG', repr(str(config)).encode())
            (folder / name).write_bytes(text)
    (folder / 'config.py').write_text(f'# Mine.\n_base_ = {str(config)!r}\n')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    state = MODELS.build(cfg.model).state_dict()
    good = folder / 'good.pth'
    write_checkpoint(dict(state_dict=state), good)
    data = good.read_bytes()
    (folder / 'cut.pth').write_bytes(data[:20000])
    (folder / 'zeros.pth').write_bytes(data[:60000] + bytes(4096) + data[64096:])
    (folder / 'empty.pth').touch()
    torch.save([1, 2], folder / 'list.pth')
    (folder / 'soft.pth').symlink_to(good)
    (folder / 'hard.pth').hardlink_to(good)
    (folder / 'good.pkl').symlink_to(good)
    (folder / 'mine_config.py').write_text('x = 1\n')
    (folder / 'circle.pth').symlink_to('circle.pth')
    (folder / 'here').symlink_to('.')
    bad = {key: value.clone() for key, value in state.items()}
    bad['backbone.stem.norm.running_mean'][0] = float('nan')
    torch.save(bad, folder / 'nan.pth')
    cfg.model.backbone.depth = 34
    torch.save(MODELS.build(cfg.model).state_dict(), folder / 'other.pth')
    linked = folder / 'linked'
    linked.mkdir()
    (linked / 'digits.json').write_text('{}')
    (linked / 'train').symlink_to(folder)
    return folder


def contents(folder):
    """Every file, by what is in it, but for what runners log."""
    return {
        str(path): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in sorted(folder.rglob('*'))
        if 'work_dirs' not in path.parts
    }


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_each_ends_with_one_line(folder, config, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv('RANK', raising=False)
    every = list(lines())
    random.Random(0).shuffle(every)
    assert len(every) >= 200
    before, found, problems = contents(folder), Counter(), []
    for tool, words in every[:LINES]:
        words = [word.replace('CONFIG', str(config)) for word in words]
        problem = 'ends well'
        try:
            run_here(tool, *words)
        except SystemExit as exit:
            error = capsys.readouterr().err
            code, text = exit.code, exit.code
            if code == 2:
                text = error.splitlines()[-1].partition(': ')[2]
            found['of the parser' if code == 2 else 'of the tool'] += 1
            problem = ''
            if not str(text).startswith('error: ') or 'Traceback' in error:
                problem = f'ends with {text}'
            elif '\n' in text or len(text) > 1000:
                problem = f'ends with so much: {text}'
        except BaseException as error:
            problem = f'ends with {error!r}'
        after = contents(folder)
        if after != before:
            changed = [k for k in {*before, *after} if before.get(k) != after.get(k)]
            problem += f', and changes {changed}'
            before = after
        if problem:
            problems.append(f'{tool} {" ".join(words)} {problem}')
    with capsys.disabled():
        print(f'\n{LINES} command lines, errors: {dict(found)}')
    assert not problems, '\n'.join([f'{len(problems)} problems', *problems])
