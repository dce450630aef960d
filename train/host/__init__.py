"""What the host knows of tensors on a device, so that it waits for no answer."""
