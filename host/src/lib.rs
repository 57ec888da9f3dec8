//! The agent that makes Machines real on one server
