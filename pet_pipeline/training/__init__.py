"""What `train_pet.py` needs: options, data, loss, optimizer, checkpoints and the log."""
