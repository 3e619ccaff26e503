"""Model, optimizer and data loader, adapted to whatever the process finds itself in."""
