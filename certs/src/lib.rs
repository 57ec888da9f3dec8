//! ACME accounts, orders, challenges, renewal, and certificates by SNI
