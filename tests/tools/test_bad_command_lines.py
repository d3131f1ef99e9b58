"""Command lines that cannot work: each ends with one line, and destroys nothing."""

import pytest
import torch
from helpers import import_models
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tool_runs import run_here

from mmorepa.__main__ import COMMANDS
from mmorepa.converters import write_checkpoint

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
    'broken.json': '{',
    'notes.txt': 'model = dict()\n',
    'type.py': "_base_ = CONFIG\nmodel = dict(backbone=dict(type='OREPAResNett'))\n",
    'argument.py': '_base_ = CONFIG\nmodel = dict(backbone=dict(dpeth=18))\n',
    'block.py': "_base_ = CONFIG\nmodel = dict(backbone=dict(block='x'))\n",
    'none.py': None,
    '.': None,
}
CHECKPOINTS = ('none.pth', '.', 'notes.txt', 'empty.pth', 'cut.pth', 'zeros.pth')
CHECKPOINTS += ('nan.pth', 'other.pth', 'list.pth', 'none.safetensors')
OUTPUTS = ('.', 'soft.pth', 'hard.pth', 'good.pth', 'notes.txt/a.pth', 'mine.pth')
OPTIONS = (
    'model=3',
    'model=None',
    'model.backbone.strides=(1,2',
    'model.backbone.depth=17',
    'model.backbone.frozen_stages=9',
    'default_scope=mmpretrian',
    'work_dir=notes.txt',
    'custom_hooks.0.type=Nothing',
    'randomness.seed=x',
    'optim_wrapper.optimizer.type=SDG',
    'optim_wrapper.optimizer.lr=-1',
    'optim_wrapper.paramwise_cfg.stem_lr_multt=2',
    'param_scheduler.0.type=Nothing',
    'train_cfg.max_epoch=3',
    'train_dataloader.batch_size=0',
    'train_dataloader.dataset.type=Nothing',
    'train_dataloader.dataset.pipeline.0.type=Nothing',
    'val_dataloader.dataset.data_root=none',
    'val_evaluator.type=Nothing',
    'load_from=nan.pth',
    'resume=True load_from=good.pth',
)
LINES = [
    *(f'flops {name}' for name in CONFIGS),
    *(f'deploy CONFIG {name} out.pth' for name in CHECKPOINTS),
    *(f'deploy CONFIG good.pth {name}' for name in OUTPUTS),
    *(f'train CONFIG --cfg-options {option}' for option in OPTIONS),
    # Of each other tool a config, a checkpoint, an output and a flag.
    'train syntax.py',
    'train CONFIG --resume=cut.pth',
    'train CONFIG --work-dir notes.txt',
    'train config.py --work-dir .',
    'train CONFIG --nothing',
    'train CONFIG --launcher pytorch',
    'test type.py good.pth',
    'test CONFIG other.pth',
    'test CONFIG good.pth --out good.pkl',
    'test CONFIG good.pth --out a.json',
    'test CONFIG good.pth --out-item pred',
    'predict CONFIG good.pth none.png',
    'deploy CONFIG good.pth out.pth --shape 0 0',
    'deploy CONFIG good.pth out.pth --tolerance nan',
    'deploy CONFIG good.pth out.pth --json out.pth',
    'export_onnx block.py good.pth out.onnx',
    'export_onnx CONFIG nan.pth out.onnx',
    'export_onnx CONFIG good.pth CONFIG',
    'quantize argument.py good.pth out.onnx',
    'quantize CONFIG other.pth out.onnx',
    'quantize CONFIG good.pth good.pth',
    'quantize CONFIG good.pth out.onnx --images 0',
    'convert cut.pth out.pth',
    'convert good.pth good.pth',
    'convert good.pth out.pth',
    'convert_plain none.pth CONFIG out.pth',
    'flops CONFIG --shape 8 8 8',
    'digits --out notes.txt',
    'digits --out linked',
    'draw CONFIG good.pth good.pth good.pth',
    'draw CONFIG good.pth good.pth out.png --images 0',
    'curves none --out out.png',
    'branch_similarity CONFIG cut.pth --out out.png',
    'branch_shares no_model.py good.pth --out out.png',
]


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
    (folder / 'mine_config.py').write_text('x = 1\n')
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
    for name in ('soft.pth', 'good.pkl'):
        (folder / name).symlink_to(good)
    (folder / 'hard.pth').hardlink_to(good)
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
@pytest.mark.parametrize('line', LINES)
def test_ends_with_one_line(line, folder, config, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv('RANK', raising=False)
    name, *words = [word.replace('CONFIG', str(config)) for word in line.split(' ')]
    before = contents(folder)
    with pytest.raises(SystemExit) as caught:
        run_here(COMMANDS[name], *words)
    printed, text = capsys.readouterr().err, caught.value.code
    if text == 2:  # Of the parser.
        text = printed.splitlines()[-1].partition(': ')[2]
    assert text.startswith('error: ') and '\n' not in text and len(text) < 1000
    assert contents(folder) == before
