# The recipe of the digits, with the learning rate that is best for plain networks.
_base_ = 'digits_bs64_20e.py'
