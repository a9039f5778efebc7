//! Agreement before the first step: ranks that were started with another config, build or data set are refused while
//! nothing is lost yet.

use super::world::World;
use crate::bridge::bytes;
use crate::fault::{Code, Fault, Result};
use std::time::Duration;
use tch::Tensor;

/// A rank may still be reading what it is to be compared by.
const DEADLINE: Duration = Duration::from_secs(600);

/// Compares labelled values (digests, versions, seeds) over ranks; collective. Where they differ, every rank gets the
/// same fault (exit code 76), which shows each label, its values and who has them.
pub fn agree(world: &dyn World, own: &[(&str, String)]) -> Result<()> {
    let mut channel = world.channel("agree")?;
    let text = serde_json::to_vec(own).expect("pairs of strings");
    let length = Tensor::from_slice(&[text.len() as i64]);
    let lengths = Vec::<i64>::try_from(channel.all_gather(&length).wait(DEADLINE)?.reshape([-1]))?;
    let width = lengths.iter().copied().max().unwrap_or(0) as usize;
    let mut padded = text;
    padded.resize(width, b' ');
    let all = channel.all_gather(&Tensor::from_slice(&padded)).wait(DEADLINE)?;
    let read = |bytes: &[u8]| serde_json::from_slice::<Vec<(String, String)>>(bytes);
    let ranks = bytes(&all).chunks(width.max(1)).map(read).collect::<Result<Vec<_>, _>>();
    let ranks = ranks.map_err(|error| Fault::failed(format!("agreement: another rank sent nonsense: {error}.")))?;
    let differences = differences(&ranks);
    if differences.is_empty() {
        return Ok(());
    }
    let message = format!(
        "Ranks disagree, so nothing was started:\n{}\nStart every rank with the same program, config and data.",
        differences.join("\n")
    );
    Err(Fault::new(Code::Disagree, message))
}

/// One line for each label whose values differ, such as `  config: a1 on ranks 0, 2; b7 on rank 1`.
fn differences(ranks: &[Vec<(String, String)>]) -> Vec<String> {
    let mut labels: Vec<&str> = Vec::new();
    for (label, _) in ranks.iter().flatten() {
        if !labels.contains(&label.as_str()) {
            labels.push(label);
        }
    }
    labels.into_iter().filter_map(|label| difference(label, ranks)).collect()
}

fn difference(label: &str, ranks: &[Vec<(String, String)>]) -> Option<String> {
    let mut groups: Vec<(&str, Vec<usize>)> = Vec::new();
    for (rank, pairs) in ranks.iter().enumerate() {
        let value = pairs.iter().find(|(name, _)| name == label).map_or("nothing", |(_, value)| value);
        match groups.iter_mut().find(|(other, _)| *other == value) {
            Some((_, members)) => members.push(rank),
            None => groups.push((value, vec![rank])),
        }
    }
    let tell = |(value, members): &(&str, Vec<usize>)| {
        // A thousand ranks would fill the screen; the first few are enough to find the host.
        let shown: Vec<String> = members.iter().take(8).map(usize::to_string).collect();
        let more = if members.len() > 8 { format!(" and {} more", members.len() - 8) } else { String::new() };
        format!("{value} on rank{} {}{more}", if members.len() > 1 { "s" } else { "" }, shown.join(", "))
    };
    let told: Vec<String> = groups.iter().map(tell).collect();
    (groups.len() > 1).then(|| format!("  {label}: {}", told.join("; ")))
}
