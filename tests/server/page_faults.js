// A list of a page's accessibility faults, for users with low vision or without a mouse.
(() => {
  const faults = [], shown = (one) => one.checkVisibility({ visibilityProperty: true }) && !one.closest("[aria-hidden=true]");
  const nameOf = (one) => one.getAttribute("aria-label") || (one.labels && [...one.labels].map((label) => label.textContent).join(" "))
    || one.textContent;
  const say = (one, what) => faults.push(`${one.tagName} ${one.id || one.className}: ${what}`);
  for (const one of document.querySelectorAll("input, select, textarea, button, a[href], canvas")) {
    if (shown(one) && !nameOf(one).trim()) say(one, "has no name");
  }
  for (const one of document.querySelectorAll("img")) if (!one.hasAttribute("alt")) say(one, "has no alt");
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  for (const id of new Set(ids)) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push(`id ${id} is used twice`);
  for (const name of ["for", "aria-labelledby", "aria-describedby", "aria-errormessage"]) {
    for (const one of document.querySelectorAll(`[${name}]`)) if (!document.getElementById(one.getAttribute(name))) say(one, `${name} leads nowhere`);
  }
  if (!document.documentElement.lang || !document.title || document.querySelectorAll("h1").length !== 1 || !document.querySelector("main")) faults.push("the document");
  const parse = (color) => { const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = ([r, g, b, a], [x, y, z]) => [a * r + (1 - a) * x, a * g + (1 - a) * y, a * b + (1 - a) * z, 1];
  const ground = (one) => {
    const own = parse(getComputedStyle(one).backgroundColor);
    return own[3] === 1 ? own : over(own, one.parentElement ? ground(one.parentElement) : [255, 255, 255, 1]);
  };
  const light = (color) => color.slice(0, 3).map((c) => c / 255).map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  for (const one of document.querySelectorAll("body *")) {
    const has = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && !one.closest("script, style, noscript, option, [aria-disabled=true]");
    if (!has || !shown(one)) continue;
    const back = ground(one), [low, high] = [light(over(parse(getComputedStyle(one).color), back)), light(back)].sort((a, b) => a - b);
    if ((high + .05) / (low + .05) < 4.5) say(one, `contrast ${((high + .05) / (low + .05)).toFixed(2)}`);
  }
  for (const one of document.querySelectorAll("button, select, textarea, input:not(.unseen, [type=radio])")) {
    if (shown(one) && one.getBoundingClientRect().height < 24) say(one, "is too small to touch");
  }
  return faults;
})()
