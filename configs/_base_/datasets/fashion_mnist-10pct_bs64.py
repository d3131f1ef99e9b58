# The first tenth of the training images; they come in random order.
_base_ = 'fashion_mnist_bs64.py'

train_dataloader = dict(dataset=dict(indices=6000))
