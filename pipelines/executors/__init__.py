"""The ways to execute commands: DALI graphs with compiled functions or DALI's operators, and torchvision."""
