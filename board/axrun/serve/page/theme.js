// Runs before the page is shown, so that a chosen theme does not flash; a classic script. "" follows the system.
function applyTheme(theme) {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}
try {
  applyTheme(JSON.parse(localStorage.getItem("axrun.settings"))?.theme);
} catch {
  // storage is disabled
}
