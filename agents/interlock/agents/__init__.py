"""What runs beside the agents: the base class, the gateway, and the host that supervises them."""
