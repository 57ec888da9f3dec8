//! Ingress and gate: public requests to Machines
