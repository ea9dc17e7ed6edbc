"""What the commands of this folder are made of; nothing here is run by itself but `worker`."""
