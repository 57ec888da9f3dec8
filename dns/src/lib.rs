//! The .internal resolver
