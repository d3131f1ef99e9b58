# The recipe of the digits, at the learning rate that is best for the plain ResNet-18.
_base_ = 'digits_bs64_20e.py'

optim_wrapper = dict(optimizer=dict(lr=0.05))
