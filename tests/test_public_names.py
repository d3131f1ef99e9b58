"""Every public name of an earlier version is still where it was."""

from importlib import import_module

import pytest

# Those of 0.1.0. Its BlockType is gone: see BLOCKS.
NAMES = {
    'mmorepa': """
        __version__ backbones engine folded functional is_switchable layers
        reparameterize switch_to_deploy
    """,
    'mmorepa.functional': """
        Fold average_kernel compose_1x1_kxk compose_deep_linear constant
        constant_response depthwise_separable_kernel embed_1x1 filtered_kernel
        fold_kernel frequency_prior fuse_bn identity_1x1 is_followed
        recomputed scaled_sum solve_deep_linear solve_scaled_sum
    """,
    'mmorepa.layers': """
        BLOCKS ConvAct2d DBBConv2d DeepLinearConv2d DeepLinearKernel
        FoldedKernel HeldKernel MultiBranchConv2d OREPAConv2d OREPADeepLinearKernel
        OREPAKernel OREPAPointwiseKernel OREPARepVGGConv2d PlainConv2d PlainKernel
        RepVGGConv2d ReparamConv2d build_conv build_reparameterized folded held
        is_switchable outermost pull_back reparameterize switch_to_deploy
        tell_plain_starts
    """,
    'mmorepa.backbones': 'OREPARepVGG OREPAResNet StagedBackbone',
    'mmorepa.engine': """
        BFloat16OptimWrapper CrashSafeHook EquivalentKernelDecayHook
        FoldedAmpOptimWrapper FoldedBFloat16OptimWrapper FoldedDistributedDataParallel
        FoldedEvaluationHook FoldedOptimWrapper OREPAOptimWrapperConstructor
        SwitchToDeployHook allow_mmengine_checkpoints deploy_checkpoint
        read_checkpoint write_checkpoint
    """,
    'mmorepa.converters': """
        ARCHITECTURES backbone_of classifier_entries from_published identify
        plain_twin start_from_plain twin_entries
    """,
}


@pytest.mark.parametrize('module', NAMES)
def test_names(module):
    found = import_module(module)
    assert not [name for name in NAMES[module].split() if not hasattr(found, name)]
