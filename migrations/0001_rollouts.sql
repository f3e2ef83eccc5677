ALTER TABLE `publications` ADD `activate_at_ms` integer;--> statement-breakpoint
ALTER TABLE `publications` ADD `rollout` text;--> statement-breakpoint
ALTER TABLE `publications` ADD `auto_rollback` text;--> statement-breakpoint
ALTER TABLE `publications` ADD `reason` text;