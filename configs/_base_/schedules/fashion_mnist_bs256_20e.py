# Batches four times as large, and so is the learning rate.
_base_ = 'fashion_mnist_bs64_20e.py'

optim_wrapper = dict(optimizer=dict(lr=0.2))
auto_scale_lr = dict(base_batch_size=256)
