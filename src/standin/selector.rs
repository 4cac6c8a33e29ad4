//! The part of Mango selectors that webhooks are tried with: equality, comparisons, `$and`, `$or`, `$exists`.
//!
//! Leaves out everything else of the language: an unknown operator is refused as CouchDB refuses one.

use std::cmp::Ordering;

use serde_json::Value;

use crate::standin::docs::Refusal;

/// Whether a document passes.
///
/// # Errors
/// 400 for an operator that is not known here.
pub(crate) fn matches(selector: &Value, doc: &Value) -> Result<bool, Refusal> {
    let Value::Object(members) = selector else {
        return Err(Refusal::new(400, "bad_request", "Selector error: expected a JSON object"));
    };
    for (name, wanted) in members {
        let passes = match (name.as_str(), wanted) {
            ("$and", Value::Array(all)) => each(all, doc)?.into_iter().all(|passes| passes),
            ("$or", Value::Array(any)) => each(any, doc)?.into_iter().any(|passes| passes),
            _ if name.starts_with('$') => return Err(unknown(name)),
            _ => field_matches(wanted, name.split('.').try_fold(doc, |at, part| at.get(part)))?,
        };
        if !passes {
            return Ok(false);
        }
    }
    Ok(true)
}

fn each(selectors: &[Value], doc: &Value) -> Result<Vec<bool>, Refusal> {
    selectors.iter().map(|selector| matches(selector, doc)).collect()
}

fn unknown(name: &str) -> Refusal {
    Refusal::new(400, "bad_request", format!("Unsupported operator: {name}"))
}

fn field_matches(wanted: &Value, found: Option<&Value>) -> Result<bool, Refusal> {
    let Value::Object(operators) = wanted else { return Ok(found == Some(wanted)) };
    if !operators.keys().any(|name| name.starts_with('$')) {
        return found.map_or(Ok(false), |found| matches(wanted, found));
    }
    for (name, operand) in operators {
        let order = found.and_then(|found| compare(found, operand));
        let passes = match name.as_str() {
            "$eq" => found == Some(operand),
            "$ne" => found.is_some() && found != Some(operand),
            "$gt" => order == Some(Ordering::Greater),
            "$gte" => matches!(order, Some(Ordering::Greater | Ordering::Equal)),
            "$lt" => order == Some(Ordering::Less),
            "$lte" => matches!(order, Some(Ordering::Less | Ordering::Equal)),
            "$exists" => Some(found.is_some()) == operand.as_bool(),
            _ => return Err(unknown(name)),
        };
        if !passes {
            return Ok(false);
        }
    }
    Ok(true)
}

fn compare(left: &Value, right: &Value) -> Option<Ordering> {
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => left.as_f64()?.partial_cmp(&right.as_f64()?),
        (Value::String(left), Value::String(right)) => Some(left.cmp(right)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(selector: &str, doc: &str, expected: Result<bool, u16>) {
        let value = |json: &str| serde_json::from_str::<Value>(json).unwrap();
        let found = matches(&value(selector), &value(doc)).map_err(|refusal| refusal.status);
        assert_eq!(found, expected, "{selector} {doc}");
    }

    #[test]
    fn selects_as_mango_does() {
        let order = r#"{"type":"order","total":3,"at":{"city":"Ulm"}}"#;
        let tombstone = r#"{"_id":"x","_deleted":true}"#;
        check("{}", order, Ok(true));
        check(r#"{"type":"order"}"#, order, Ok(true));
        check(r#"{"type":"order"}"#, tombstone, Ok(false));
        check(r#"{"$or":[{"type":"order"},{"_deleted":true}]}"#, tombstone, Ok(true));
        check(r#"{"type":"order","total":{"$gt":2}}"#, order, Ok(true));
        check(r#"{"total":{"$gt":3}}"#, order, Ok(false));
        check(r#"{"total":{"$gte":3,"$lt":4}}"#, order, Ok(true));
        check(r#"{"at.city":"Ulm"}"#, order, Ok(true));
        check(r#"{"at":{"city":"Bonn"}}"#, order, Ok(false));
        check(r#"{"$and":[{"total":3},{"gone":{"$exists":false}}]}"#, order, Ok(true));
        check(r#"{"total":{"$near":3}}"#, order, Err(400));
        check("[]", order, Err(400));
    }
}
