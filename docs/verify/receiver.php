<?php // WEBHOOK_SECRET=whsec_... php -S 127.0.0.1:8787 receiver.php
// Several secrets, separated by blanks, while one replaces another.
$keys = array_map(fn($s) => base64_decode(preg_replace('/^whsec_/', '', $s)), explode(' ', getenv('WEBHOOK_SECRET')));

function is_genuine(array $keys, string $body): bool {
    $at = $_SERVER['HTTP_WEBHOOK_TIMESTAMP'] ?? '';
    if (!ctype_digit($at) || abs(time() - (int) $at) > 300) return false;
    $signed = ($_SERVER['HTTP_WEBHOOK_ID'] ?? '') . ".$at.$body"; // the body as it came, not decoded and encoded again
    $genuine = false;
    foreach ($keys as $key) {
        $wanted = 'v1,' . base64_encode(hash_hmac('sha256', $signed, $key, true));
        foreach (explode(' ', $_SERVER['HTTP_WEBHOOK_SIGNATURE'] ?? '') as $given) {
            $genuine = hash_equals($wanted, $given) || $genuine;
        }
    }
    return $genuine;
}

$body = file_get_contents('php://input');
$genuine = is_genuine($keys, $body);
if ($genuine) {
    $event = json_decode($body);
    error_log("$event->id $event->type {$event->data->id}"); // known id: seen before, do nothing
}
http_response_code($genuine ? 204 : 401);
