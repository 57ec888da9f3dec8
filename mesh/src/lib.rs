//! The WireGuard network between hosts and to laptops
