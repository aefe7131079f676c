"""Who makes a network lead a floating IP to a node: one provider a file, all behind base.AddressProvider."""
