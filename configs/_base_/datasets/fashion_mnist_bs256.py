# Large batches, for a GPU.
_base_ = 'fashion_mnist_bs64.py'

train_dataloader = dict(batch_size=256)
val_dataloader = dict(batch_size=256)
test_dataloader = dict(batch_size=256)
