//! Where new Machines are made: settled before anything is built.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::appconfig::Loaded;
use crate::client::Client;

/// What becomes of a wish for a region.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// It is there, or none is wished for.
    AsWritten,
    /// It is not there, and the only one that is stands for it.
    Only(String),
}

/// Makes sure that there is a host in the file's `primary_region`. In a cloud of one region any name will do, and the
/// app is told that one's.
pub async fn settle(client: &Client, loaded: &mut Loaded) -> Result<()> {
    let Some(wanted) = loaded.config.primary_region.clone() else {
        return Ok(());
    };
    let answer: Value = client.get("/v1/platform/regions").await?;
    let regions = answer["regions"].as_array().into_iter().flatten();
    let regions: Vec<&str> = regions.filter_map(|r| r["code"].as_str()).collect();
    if let Choice::Only(region) = choose(&wanted, &regions)? {
        eprintln!(
            "Warning: {}: there is no region \"{wanted}\" here; \"{region}\", the only one, is used",
            loaded.path.display()
        );
        loaded.config.primary_region = Some(region);
    }
    Ok(())
}

fn choose(wanted: &str, regions: &[&str]) -> Result<Choice> {
    match regions {
        // No host yet: the server says so.
        [] => Ok(Choice::AsWritten),
        known if known.contains(&wanted) => Ok(Choice::AsWritten),
        [only] => Ok(Choice::Only((*only).to_owned())),
        known => bail!(
            "no host is in primary_region \"{wanted}\"; there is {}. Write one of them into fly.toml, or start a \
             host with `tern serve --region {wanted}`",
            known.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_that_is_not_there_is_told_with_those_that_are() {
        assert_eq!(choose("ams", &["ams", "fra"]).unwrap(), Choice::AsWritten);
        assert_eq!(choose("ams", &[]).unwrap(), Choice::AsWritten);
        let error = choose("ams", &["fra", "local"]).unwrap_err().to_string();
        assert!(
            error.contains("\"ams\"") && error.contains("fra, local"),
            "{error}"
        );
    }

    #[test]
    fn the_only_region_stands_for_any() {
        assert_eq!(
            choose("ams", &["local"]).unwrap(),
            Choice::Only("local".into())
        );
    }
}
